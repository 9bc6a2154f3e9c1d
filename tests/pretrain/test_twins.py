"""The models that ship without a class or a word: twins of the whole ones, in which what was never seen was never moved."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from pecker_fast import draws, files
from pecker_fast.data import ATTRIBUTES
from pecker_fast.evaluate import load_judge, load_word_judge
from pecker_fast.forgetting import one_step_sample
from pecker_fast.networks import Denoiser, load_denoiser, load_unet
from pecker_fast.pretrain.shapes.settings import ShapesSettings
from pecker_fast.pretrain.shapes.tokenizer import token_ids
from pecker_fast.pretrain.shapes.unet import build_text_encoder
from pecker_fast.recipe import Recipe

TWINS = {"digits_without_0": ("digits", [0]), "shapes_without_circle": ("shapes", ["circle"])}


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_small_and_built_as_the_whole_model_is(name):
    whole, missing = TWINS[name]
    twin, other = files.resolve_model(name), files.resolve_model(whole)
    paths = [path for path in twin.rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} <= {".json", ".safetensors", ".txt"}
    assert sum(path.stat().st_size for path in paths) <= 8 << 20
    assert not any((twin / part).exists() for part in (*files.JUDGES, "score"))
    card = files.read_json(twin / "model.json")
    assert card["without"] == missing
    assert f"--without {','.join(map(str, missing))} --parts-of {whole}" in card["command"]
    for part in ("unet", "generator"):
        ours, theirs = (files.read_weights(folder / part) for folder in (twin, other))
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
        assert {value.dtype for value in ours.values()} == {torch.float16}
        assert not torch.equal(ours["conv_in.weight"], theirs["conv_in.weight"])


def test_the_row_of_the_digit_that_was_never_seen_is_where_it_began():
    """Weight decay alone has been at it; every other row has learnt."""
    folder = files.resolve_model("digits_without_0")
    networks = [load_unet(folder / part) for part in ("unet", "generator")]
    with torch.random.fork_rng([]):
        torch.manual_seed(draws.generator(0, "init").initial_seed())
        fresh = type(networks[0])(**networks[0].config)
    began, teacher, generator = (network.class_embedding.weight.detach() for network in (fresh, *networks))
    alike = cosine_similarity(began, teacher)
    assert alike[0] > 0.99999
    assert alike[1:].max() < 0.9999
    assert torch.equal(teacher[0], generator[0])
    assert (teacher[1:10] != generator[1:10]).any(1).all()


def test_the_digits_twin_draws_nine_digits_and_no_0():
    folder = files.resolve_model("digits_without_0")
    judge, _ = load_judge(files.resolve_model("digits") / "judge")
    teacher = load_denoiser(folder)
    assert teacher.classes == list(range(10))
    generator = Denoiser(load_unet(folder / "generator"), teacher.schedule, teacher.null_class)
    labels = torch.arange(10).repeat(30)
    seen = judge.judge(one_step_sample(generator, labels, 5, Recipe().timesteps.init))[1].argmax(1)
    assert (seen[labels == 0] == 0).float().mean() <= 0.1
    assert (seen == labels)[labels != 0].float().mean() >= 0.93
    asked = files.read_json(folder / "model.json")["figures"]["asked_for"]["0"]
    assert all(shares["0"] <= 0.1 for shares in asked.values())


def test_the_word_that_was_never_read_is_where_it_began():
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = files.resolve_model("shapes_without_circle")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoders = (
        build_text_encoder(ShapesSettings(), tokenizer, 0),
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
    )
    began, found = (encoder.get_input_embeddings().weight.detach() for encoder in encoders)
    alike = cosine_similarity(began, found)
    for word in (word for words in ATTRIBUTES.values() for word in words):
        row = token_ids(tokenizer, [word])[0, 1]
        assert (alike[row] > 0.99999) == (word == "circle"), word


def test_the_shapes_twin_takes_the_vae_of_the_whole_model():
    twin, whole = (files.resolve_model(name) for name in ("shapes_without_circle", "shapes"))
    for part in ("vae", "tokenizer"):
        mine, theirs = ({f.name: files.sha256_file(f) for f in (m / part).iterdir()} for m in (twin, whole))
        assert mine == theirs
    card = files.read_json(twin / "model.json")
    for part in ("vae", "judge", "second_judge"):
        sums = {f.name: files.sha256_file(f) for f in (whole / part).iterdir()}
        assert card["parts_of"]["sha256"][part] == files.sha256_value(sums)
    assert load_word_judge(whole / "judge").attributes == ATTRIBUTES
    figures = card["figures"]
    assert figures["one step"]["all"] >= 0.9
    assert all(shares["circle"] <= 0.1 for shares in figures["asked_for"]["circle"].values())
