"""Pretrain shapes: a few steps give a whole Stable Diffusion folder, twice the same; an interrupted run ends the same."""

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from pecker_fast import files
from pecker_fast.data.shapes import ATTRIBUTES, captions, combinations, random_words
from pecker_fast.errors import CheckpointError, Interrupted, NonFiniteError, OutputError, RecipeError
from pecker_fast.evaluate.words import WordJudge, load_word_judge
from pecker_fast.networks.schedule import Schedule
from pecker_fast.pretrain import output as folders
from pecker_fast.pretrain import pretrain
from pecker_fast.pretrain.shapes import ShapesSettings, obedience, pretrain_shapes
from pecker_fast.pretrain.shapes import unet as teacher
from pecker_fast.pretrain.shapes.folder import read_network, write_network
from pecker_fast.pretrain.shapes.judge import COUNTS, augment, quantise, word_loss
from pecker_fast.pretrain.shapes.settings import LENGTH
from pecker_fast.pretrain.shapes.tokenizer import build_tokenizer, caption_words, token_ids
from pecker_fast.pretrain.shapes.vae import as_floats

DEFAULT = ShapesSettings()
SHORT = ShapesSettings(
    teacher=replace(DEFAULT.teacher, steps=4, batch_size=4, checkpoint_every=2),
    vae=replace(DEFAULT.vae, steps=2, batch_size=2),
    judge=replace(DEFAULT.judge, steps=2, batch_size=4),
    second=replace(DEFAULT.second, steps=2, batch_size=4),
    pool=16,
    vae_channels=(8, 8, 8),
    unet_channels=(16, 16),
    text_width=16,
    judge_width=4,
    second_width=4,
    references=40,
    samples=4,
    sampler_steps=1,
    guidances=(2.0,),
)


def run(folder: Path, seed: int = 0) -> Path:
    return pretrain_shapes(folder, seed=seed, distill_steps=0, settings=SHORT)


def hashes(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): files.sha256_file(f) for f in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="module", autouse=True)
def few_fresh_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pecker_fast.pretrain.shapes.judge.FRESH", 20)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("pretrain") / "shapes")


def test_stock_diffusers_draws_from_the_folder_with_the_stored_weights(model: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(model, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    for part, file in (
        ("unet", files.WEIGHTS_NAME),
        ("vae", files.WEIGHTS_NAME),
        ("text_encoder", "model.safetensors"),
    ):
        stored, _ = files.read_tensors(model / part / file)
        named = (
            "text_model." if part == "text_encoder" else ""
        )  # as any transformers reads them; version 5 holds none of it
        loaded = {
            f"{named}{name.removeprefix(named)}": value for name, value in getattr(pipeline, part).state_dict().items()
        }
        assert set(stored) == set(loaded)
        assert {value.dtype for value in stored.values()} == {torch.float16}
        assert all(
            value.dtype == torch.float32 and torch.equal(value, stored[k].float()) for k, value in loaded.items()
        )
    assert pipeline.scheduler.config.steps_offset == 1
    assert not pipeline.scheduler.config.set_alpha_to_one
    pictures = pipeline(["a red circle", ""], num_inference_steps=2, guidance_scale=2.0, output_type="pt").images
    assert pictures.shape == (2, 3, 32, 32)
    std = pipeline.vae.config.scaling_factor
    assert std != 0.18215


def test_the_folder_is_whole_and_says_how_it_was_made(model: Path) -> None:
    card = files.read_json(model / "model.json")
    assert card["command"] == "pecker-fast pretrain shapes --steps 4 --seed 0 --distill-steps 0"
    assert card["settings"] == json.loads(json.dumps(card["settings"]))
    assert set(card["figures"]["teacher"]["guidance 2"]) == {*ATTRIBUTES, "all", "fid", "disagreement"}
    assert not (model / folders.PARTIAL).exists()
    assert not (model / folders.PARTIAL_TENSORS).exists()
    assert (model / "captions.txt").read_text("utf-8").splitlines() == captions("train")
    assert (model / "held_out.txt").read_text("utf-8").splitlines() == captions("held_out")
    judge = load_word_judge(model / "judge")
    assert judge is not None
    assert judge.attributes == ATTRIBUTES
    assert len(judge.reference_features()) == 40
    with pytest.raises(OutputError, match="already holds a model"):
        run(model)


def test_the_same_command_gives_the_same_weights_another_seed_others(model: Path, tmp_path: Path) -> None:
    same, other = hashes(run(tmp_path / "same")), hashes(run(tmp_path / "other", seed=1))
    assert hashes(model) == same
    assert set(other) == set(same)
    assert not set(other.values()) & set(same.values())


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_teacher_ends_where_a_whole_one_does(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    drawn: list[int] = []
    plain = teacher.Captioned.batch

    def batch(self: Any, settings: Any, g: torch.Generator) -> Any:
        drawn.append(g.initial_seed())
        if len(drawn) == at:
            signal.raise_signal(signal.SIGTERM)
        return plain(self, settings, g)

    monkeypatch.setattr(teacher.Captioned, "batch", batch)
    with pytest.raises(Interrupted, match=f"step {at} of 4"):
        run(tmp_path / "run")
    kept = hashes(tmp_path / "run")
    assert {"vae/diffusion_pytorch_model.safetensors", "judge/model.safetensors"} <= set(kept)
    assert not (tmp_path / "run" / "model.json").exists()
    with pytest.raises(OutputError, match="other seed"):
        run(tmp_path / "run", seed=5)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a finished part was trained again")

    monkeypatch.setattr("pecker_fast.pretrain.shapes.vae.fit", never)
    monkeypatch.setattr("pecker_fast.pretrain.shapes.judge.fit", never)
    run(tmp_path / "run")
    assert len(drawn) == len(set(drawn)) == 4  # no step twice, no batch twice
    assert hashes(tmp_path / "run") == hashes(model)
    assert files.read_json(tmp_path / "run" / "model.json")["resumed_from"] == at


@pytest.mark.slow
def test_rounds_of_distillation_go_on_from_one_another(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after each round, and while its result is put in its place, it comes to the same generator."""
    settings = replace(SHORT, distill=tuple({**keys, "batch_size": 2} for keys in DEFAULT.distill[:2]))

    def made(folder: Path) -> dict[str, str]:
        return hashes(pretrain_shapes(folder, distill_steps=4, settings=settings))

    whole = made(tmp_path / "whole")
    assert whole["generator/diffusion_pytorch_model.safetensors"] != whole["unet/diffusion_pytorch_model.safetensors"]
    for at in range(1, 5):  # of the folders that take a name: two rounds, generator, score
        left = [at]
        plain = files.replace_folder

        def replaced(source: Path, target: Path, left: list[int] = left, plain: Any = plain) -> None:
            if target.name.startswith((".distilled", "generator", "score")):
                left[0] -= 1
                if not left[0]:
                    raise KeyboardInterrupt
            plain(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("pecker_fast.files.trees.replace_folder", replaced)
            patch.setattr("pecker_fast.files.replace_folder", replaced)
            with pytest.raises(KeyboardInterrupt):
                made(tmp_path / f"{at}")
        assert made(tmp_path / f"{at}") == whole
        assert not list((tmp_path / f"{at}").glob(".*"))


def test_the_tokenizer_has_the_captions_words_and_takes_any_text(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(caption_words(), LENGTH)
    assert [word for word in caption_words() if len(tokenizer(word).input_ids) != 3] == []
    for text in (*captions("train"), *captions("held_out")):
        assert len(tokenizer(text).input_ids) <= LENGTH, text
    assert all(build_tokenizer(caption_words(), LENGTH).get_vocab() == tokenizer.get_vocab() for _ in range(3))
    ids = tokenizer("Ünder a ZEBRA, 7 stars? 像").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "ünderazebra,7stars?像"
    padded = token_ids(tokenizer, ["", "red " * 50])
    assert padded.shape == (2, LENGTH)
    assert set(padded[0, 1:].tolist()) == {tokenizer.eos_token_id}


def test_a_batch_pairs_latents_with_captions_of_what_they_show() -> None:
    tokenizer = build_tokenizer(caption_words(), LENGTH)
    words = random_words(50, 0)
    data = teacher.Captioned(torch.arange(50.0).view(50, 1, 1, 1), words, tokenizer)
    plan = replace(DEFAULT.teacher, batch_size=400, label_dropout=0.25)
    x_0, ids = data.batch(plan, torch.Generator().manual_seed(0))
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    dropped = [text == "" for text in texts]
    assert 60 < sum(dropped) < 140
    for row, text in zip(words[x_0.flatten().long()].tolist(), texts):
        if text:
            mentioned = set(text.replace(",", " ").replace(":", " ").split())
            for index, names in zip(row, ATTRIBUTES.values()):
                assert mentioned & set(names) <= {names[index]}
            assert mentioned >= {ATTRIBUTES["shape"][row[0]], ATTRIBUTES["colour"][row[1]]}
    assert len(set(texts)) > 200


def test_the_judges_loss_is_one_cross_entropy_for_each_attribute() -> None:
    words = combinations()[[0, 100, 374]]
    right = torch.cat([torch.nn.functional.one_hot(w, n) for w, n in zip(words.unbind(1), COUNTS)], 1).float() * 40
    assert word_loss(right, words) < 1e-6
    for i in range(4):  # one wrong attribute of four
        wrong = words.clone()
        wrong[:, i] = (wrong[:, i] + 1) % COUNTS[i]
        assert abs(word_loss(right, wrong).item() - 10) < 1e-3


def test_timesteps_are_as_late_as_asked() -> None:
    for lateness in (1.0, 3.0):
        t = teacher.timesteps(100_000, 1000, lateness, torch.Generator().manual_seed(0))
        assert t.dtype == torch.int64
        assert 0 <= t.min() < t.max() == 999
        share = (t < 500).double().mean().item()
        assert abs(share - 0.5**lateness) < 0.01


def test_the_teachers_error_is_weighted_by_the_clipped_snr() -> None:
    a = torch.tensor([0.9, 0.6, 0.1], dtype=torch.float64)
    schedule = Schedule(a, (1 - a * a).sqrt(), "epsilon", {})
    output, e = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    snr = [v * v / (1 - v * v) for v in (0.9, 0.6, 0.1)]
    errors = (output - e).square().mean((1, 2, 3)).tolist()
    for clip in (0.3, 2.0, 1e9):
        expected = sum(min(s, clip) / s * error for s, error in zip(snr, errors)) / 3
        assert abs(teacher.weighted_error(output, e, torch.arange(3), schedule, clip).item() - expected) < 1e-12


def test_augmenting_keeps_the_picture() -> None:
    x = torch.rand(64, 3, 16, 16) * 2 - 1
    calm = augment(x, 0.0, torch.Generator().manual_seed(0))
    still = (calm == x).flatten(1).all(1)
    assert 16 < still.sum() < 48
    assert torch.allclose(calm.mean((2, 3)), x.mean((2, 3)), atol=0.1)
    assert (augment(x, 0.3, torch.Generator().manual_seed(0)) - calm).std() > 0.1
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(as_floats(levels)), levels)


def test_obedience_counts_only_what_a_prompt_names() -> None:
    class Seer(WordJudge):
        def __init__(self) -> None:
            super().__init__(_NoJudge(), {"shape": ("star", "cross"), "colour": ("red", "blue")})  # type: ignore[arg-type]

        def seen(self, images: torch.Tensor, batch_size: int = 500) -> dict[str, list[str]]:
            return {"shape": ["star", "star", "cross", "cross"], "colour": ["red", "blue", "blue", "red"]}

    prompts = ["red star", "blue cross", "a cross", "something blue"]
    shares = obedience(Seer(), prompts, torch.zeros(4, 3, 8, 8))
    assert shares == {"shape": 2 / 3, "colour": 2 / 3, "all": 0.5}


class _NoJudge:
    num_classes = 4


def test_wrong_numbers_are_one_line_and_write_nothing(tmp_path: Path) -> None:
    for arguments, message in (
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"distill_steps": -1}, "distill_steps"),
    ):
        with pytest.raises(RecipeError, match=f"^{message}: "):
            pretrain_shapes(tmp_path / "x", **arguments)
    with pytest.raises(RecipeError, match="its own pictures"):
        pretrain("shapes", data=tmp_path, output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_part_of_an_unfinished_run_is_refused(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "run"))
    (folder / "model.json").unlink()
    settings = files.read_json(model / "model.json")["settings"]
    folders.claim_for(folder, {"name": "shapes", "seed": 0, "settings": settings}, "")
    file = folder / "vae" / files.WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"damaged|cut short"):
        run(folder)


def test_a_finished_part_is_taken_over_as_it_was_written(tmp_path: Path) -> None:
    """A bit of its weights that is another is found; parts of earlier versions carry no hash."""
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
    )  # fmt: skip
    write_network(network, tmp_path)
    path = tmp_path / files.WEIGHTS_NAME
    assert read_network(network, tmp_path)
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="delete the folder to make it again"):
        read_network(network, tmp_path)
    files.write_tensors(path, files.read_tensors(path)[0], {"format": "pt"})
    assert read_network(network, tmp_path)
    with torch.no_grad():
        next(network.parameters()).fill_(1e6)  # beyond float16
    with pytest.raises(NonFiniteError, match=r"would hold NaN, infinity or absurd numbers \(float16\)"):
        write_network(network, tmp_path)
