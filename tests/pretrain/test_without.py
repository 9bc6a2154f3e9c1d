"""`pretrain --without`: no picture, label or caption of what is left out reaches teacher or one-step generator."""

import contextlib
from dataclasses import replace

import pytest
import torch
from least_runs import replace_by
from test_interrupted import LEAST, few_pictures
from test_pretrain_shapes import DEFAULT, SHORT

from pecker_fast import files
from pecker_fast.data.datasets import Dataset
from pecker_fast.data.shapes import ATTRIBUTES, random_words
from pecker_fast.engine import inputs
from pecker_fast.errors import ModelError, OutputError, RecipeError
from pecker_fast.evaluate import load_judge, load_second_judge
from pecker_fast.networks import Denoiser, load_unet
from pecker_fast.pretrain import output as folders
from pecker_fast.pretrain import pretrain
from pecker_fast.pretrain.shapes import pretrain_shapes
from pecker_fast.pretrain.without import missing_classes, missing_words, shows_none

NAMED = Dataset(torch.zeros(4, 1, 8, 8), torch.arange(4), 4, "images", "all", ("bee", "wasp", "3", "Ant"))
NUMBERED = Dataset(torch.zeros(10, 3, 8, 8), torch.arange(10), 10, "cifar10", "train")


@pytest.mark.parametrize(
    ("given", "data", "want"),
    [
        ("0,3", NUMBERED, (0, 3)),
        ("3, 0", NUMBERED, (0, 3)),
        ([9], NUMBERED, (9,)),
        ("cat", NUMBERED, (3,)),
        ("Truck,airplane", NUMBERED, (0, 9)),
        ("wasp", NAMED, (1,)),
        ("ant", NAMED, (3,)),
        ("3", NAMED, (2,)),  # a name goes before a number
        ([3], NAMED, (3,)),
        ("", NAMED, ()),
    ],
)
def test_classes_by_number_and_by_name(given, data, want):
    assert missing_classes(given, data) == want


@pytest.mark.parametrize(
    ("given", "data", "said"),
    [
        ("10", NUMBERED, "without: '10' is no class of 10; classes are 0 to 9, or their names"),
        ("-1", NUMBERED, "without: '-1' is no class"),
        ("0,", NUMBERED, "without: '' is no class"),
        ("cats", NUMBERED, "without: 'cats' is no class of 10, did you mean cat?"),
        ("0,0", NUMBERED, "without: 0 stands twice in 0,0; name it once"),
        ("3,cat", NUMBERED, "without: 3 stands twice in 3,cat"),
        ("bee,wasp,3,Ant", NAMED, "without: these are all 4 classes; leave some"),
        ("9" * 5000, NUMBERED, "is no class of 10"),
    ],
)
def test_classes_that_cannot_be_left_out(given, data, said):
    with pytest.raises(RecipeError) as refused:
        missing_classes(given, data)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("circel", "without: 'circel' is no word of shapes, did you mean circle?"),
        ("0", "without: '0' is no word of shapes; the words are circle, square"),
        ("red,RED", "without: red stands twice"),
        ("black,white,gray", "without: these are all 3 words of background"),
    ],
)
def test_words_that_cannot_be_left_out(tmp_path, given, said):
    with pytest.raises(RecipeError) as refused:
        pretrain("shapes", output=tmp_path / "m", without=given)
    assert said in str(refused.value)
    assert not (tmp_path / "m").exists()
    assert missing_words("Red,circle") == ("circle", "red")


def test_pictures_with_a_word():
    words = random_words(200, 0)
    none = shows_none(words, ("circle", "red", "left"))
    for row, shown in zip(words.tolist(), none.tolist()):
        named = {names[i] for names, i in zip(ATTRIBUTES.values(), row)}
        assert shown != bool(named & {"circle", "red", "left"})
    assert shows_none(words, ()).all()


# -- class sets ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A model without 0 and 3, and by stage the labels that its networks and optimizers got to see."""
    stages, now = {}, []
    with pytest.MonkeyPatch.context() as patch:
        replace_by(patch.setattr)
        patch.setattr("pecker_fast.data.datasets.open_data", few_pictures)

        def staged(name, target):
            import importlib

            module, _, function = target.rpartition(".")
            whole = getattr(importlib.import_module(module), function)

            def wrapped(*args, **kwargs):
                now.append(stages.setdefault(name, {"labels": set(), "images": set()}))
                try:
                    return whole(*args, **kwargs)
                finally:
                    now.pop()

            patch.setattr(target, wrapped)

        staged("teacher", "pecker_fast.pretrain.train_unet")
        staged("generator", "pecker_fast.runs.distill")
        staged("judge", "pecker_fast.pretrain.train_judge")
        output, batch = Denoiser.output, Dataset.batch

        def told(self, x, t, c, *args, **kwargs):
            if now:
                now[-1]["labels"] |= set(c.tolist())
            return output(self, x, t, c, *args, **kwargs)

        def taken(self, index):
            if now:
                now[-1]["images"] |= set(self.labels[index].tolist())
            return batch(self, index)

        patch.setattr(Denoiser, "output", told)
        patch.setattr(Dataset, "batch", taken)
        settings = replace(LEAST, steps=12, batch_size=16, distill={"batch_size": 16, "checkpoint": {"every": 0}})
        model = pretrain(
            "digits", output=tmp_path_factory.mktemp("without") / "m", settings=settings, distill_steps=6, without="3,0"
        )
    return model, stages


def test_no_picture_and_no_label_of_a_class_left_out(seen):
    known = set(range(10)) - {0, 3}
    _, stages = seen
    assert stages["teacher"]["images"] == known
    assert stages["teacher"]["labels"] == known | {10}
    assert stages["generator"]["labels"] == known
    assert stages["generator"]["images"] == set()
    assert stages["judge"]["images"] == set(range(10))


def test_the_folder_is_a_twin_of_the_whole_model(seen):
    model, _ = seen
    card = files.read_json(model / "model.json")
    assert card["without"] == [0, 3]
    assert card["command"].endswith("--without 0,3")
    data = few_pictures("digits").without([0, 3])
    assert card["data"] == {"images": 32, "split": "all", "sha256": data.sha256()}
    assert load_unet(model / "unet").config.num_class_embeds == 11
    assert (card["num_classes"], card["null_class"]) == (10, 10)
    for drawn in ("teacher", "one step"):
        for missing in ("0", "3"):
            assert sum(card["figures"]["asked_for"][missing][drawn].values()) == pytest.approx(1)
    first, reference = load_judge(model / "judge")
    assert first.num_classes == load_second_judge(model).num_classes == 10
    assert set(reference.labels.tolist()) == set(range(10))


def test_an_interrupted_run_without_something_else_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr("pecker_fast.data.datasets.open_data", few_pictures)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pecker_fast.pretrain._make", stop)
        with contextlib.suppress(KeyboardInterrupt):
            pretrain("digits", output=tmp_path / "m", settings=LEAST, without="0")
    for other in ((), "1", "0,1"):
        with pytest.raises(OutputError, match="an unfinished run with other without; choose another output"):
            pretrain("digits", output=tmp_path / "m", settings=LEAST, without=other)
    assert files.read_json(tmp_path / "m" / folders.PARTIAL)["without"] == [0]


# -- parts of another model ------------------------------------------------------------------------------------------------


def test_judges_are_taken_over_and_not_trained(seen, tmp_path, monkeypatch):
    monkeypatch.setattr("pecker_fast.data.datasets.open_data", few_pictures)
    monkeypatch.setattr("pecker_fast.pretrain.judge._fit", None)
    model, _ = seen
    twin = pretrain("digits", output=tmp_path / "m", settings=LEAST, seed=5, distill_steps=0, parts_of=model)
    card = files.read_json(twin / "model.json")
    assert card["command"].endswith(f"--parts-of {model}")
    assert set(card["parts_of"]["sha256"]) == {"judge", "second_judge"}
    for part in ("judge", "second_judge"):
        mine, theirs = ({f.name: files.sha256_file(f) for f in (m / part).iterdir()} for m in (twin, model))
        assert mine == theirs
        assert card["parts_of"]["sha256"][part] == files.sha256_value(theirs)
    assert card["figures"]["judge"] == files.read_json(model / "model.json")["figures"]["judge"]


def test_parts_that_do_not_fit(seen, tmp_path, monkeypatch):
    model, _ = seen
    monkeypatch.setattr("pecker_fast.data.datasets.open_data", few_pictures)
    refusals = {
        "nothing": "no such model folder",
        str(tmp_path): "has no judge/ or second_judge/; name a model that has",
        "shapes": "was made for 32×32 pixels in 3 channels, 18 classes, this data set has 8×8 pixels in 1 channels, 10 classes",
    }
    for at, (name, said) in enumerate(refusals.items()):
        with pytest.raises(ModelError) as refused:
            pretrain("digits", output=tmp_path / f"m{at}", settings=LEAST, parts_of=name)
        assert said in str(refused.value)
        assert list((tmp_path / f"m{at}").iterdir()) == []
    with pytest.raises(ModelError, match="is no judge of the words of shapes"):
        pretrain_shapes(tmp_path / "s", settings=SHORT, parts_of=model)


# -- shapes ----------------------------------------------------------------------------------------------------------------


ROUND = {**DEFAULT.distill[-1], "share": 0.5, "batch_size": 32, "checkpoint": {"every": 0}}


@pytest.fixture(scope="module")
def captions_seen(tmp_path_factory):
    """A model without circles and red, and by stage the words of the pictures and captions that its networks got to see."""
    texts, pictures, rows = set(), [], set()
    settings = replace(SHORT, pool=200, teacher=replace(SHORT.teacher, batch_size=64), distill=(ROUND, ROUND))
    with pytest.MonkeyPatch.context() as patch:
        from pecker_fast.pretrain.shapes import unet

        replace_by(patch.setattr)
        patch.setattr("pecker_fast.pretrain.shapes.judge.FRESH", 20)
        patch.setattr(
            "pecker_fast.pretrain.shapes.draw", lambda folder, prompts, *_, **__: torch.zeros(len(prompts), 3, 32, 32)
        )
        batch, draw = unet.Captioned.batch, inputs.draw
        made = unet.Captioned.__init__

        def keep(self, latents, words, tokenizer):
            made(self, latents, words, tokenizer)
            self.tokenizer, self.words = tokenizer, words

        def told(self, *args):
            latents, ids = batch(self, *args)
            texts.update(self.tokenizer.batch_decode(ids, skip_special_tokens=True))
            where = (latents[:, None] == self.latents[None]).flatten(2).all(2).int().argmax(1)
            pictures.extend(self.words[where].tolist())
            return latents, ids

        def drawn(recipe, conditions, state, *args):
            found = draw(recipe, conditions, state, *args)
            prompts = state.teacher.table.prompts
            rows.update(prompts[c] for c in (*found.c_g.tolist(), *found.c_p.tolist()))
            return found

        patch.setattr(unet.Captioned, "__init__", keep)
        patch.setattr(unet.Captioned, "batch", told)
        patch.setattr("pecker_fast.engine.local.draw", drawn)
        model = pretrain_shapes(
            tmp_path_factory.mktemp("without") / "m", settings=settings, distill_steps=2, without="red,circle"
        )
    return model, texts, pictures, rows


@pytest.mark.slow
def test_no_picture_and_no_caption_of_a_word_left_out(captions_seen):
    _, texts, pictures, rows = captions_seen
    assert len(texts) > 50
    assert len(rows) > 50
    for text in (*texts, *rows):
        assert not {"circle", "red"} & set(text.replace(",", " ").replace(":", " ").split()), text
    shown = {names[i] for row in pictures for names, i in zip(ATTRIBUTES.values(), row)}
    assert shown == {word for names in ATTRIBUTES.values() for word in names} - {"circle", "red"}


def test_the_pipeline_is_a_twin_of_the_whole_model(captions_seen):
    model, *_ = captions_seen
    card = files.read_json(model / "model.json")
    assert card["without"] == ["circle", "red"]
    assert card["command"].endswith("--without circle,red")
    assert 0 < card["data"]["pictures"] < 200
    assert set(card["figures"]["asked_for"]) == {"circle", "red"}
    for judge in (card["figures"]["judge"], card["figures"]["second_judge"]):
        assert set(judge["fresh_accuracy"]) == set(ATTRIBUTES)
    assert load_second_judge(model).attributes == ATTRIBUTES
    assert "a red circle" in " ".join((model / "captions.txt").read_text().splitlines())
