"""`images: PATH`: the pool has the user's own images of what there are images of, and the model's drawings of the rest."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))


from pecker_fast.errors import DataError, RecipeError
from pecker_fast.loading.parts import load_model
from pecker_fast.recipe import recipe_from
from pecker_fast.runs.start import train

SMALL = {"steps": 2, "batch_size": 4, "mask": {"samples": 8}, "method": "spare"}
CAPTIONS = ["a red circle on the left", "small circle"]


pytestmark = pytest.mark.usefixtures("no_forecast")


def pictures(folder, values, size=20, captions=None):
    folder.mkdir(parents=True, exist_ok=True)
    for i, value in enumerate(values):
        Image.new("RGB", (size, size), (value,) * 3).save(folder / f"{i}.png")
        if captions:
            (folder / f"{i}.txt").write_text(captions[i])


def shade(value):
    return value / 127.5 - 1


def pool_of(run):
    return load_file(Path(run) / "pool.safetensors")


@pytest.mark.parametrize("method", ["spare", pytest.param("salun", marks=pytest.mark.slow), "sa"])
def test_images_of_some_classes_and_drawings_of_the_rest(tiny_recipe, tmp_path, method):
    """sa learns from the cover in the place of the concept, spare from both in turn."""
    pictures(tmp_path / "data" / "0", [10, 60])
    pictures(tmp_path / "data" / "1", [120])
    pictures(tmp_path / "data" / "2", [200, 240, 250])
    keys = {**SMALL, "method": method, "forget": 0, "cover": 1, "retain": [1, 2]}
    images = {"samples": 7, "steps": 3}
    own = train(tiny_recipe(**keys, images={**images, "source": str(tmp_path / "data")}), quiet=True).run_dir
    found = pool_of(own)
    shades = {0: [10, 60], 1: [120], 2: [200, 240, 250]}
    for branch in ("forget", "retain"):
        c, covers = found[f"{branch}.c"].tolist(), found[f"{branch}.covers"].tolist()
        asked = c
        if branch == "forget" and method == "sa":
            asked = covers
        if branch == "forget" and method == "spare":
            asked = [covers[i] if i % 2 else c[i] for i in range(len(c))]
        dealt = dict.fromkeys(shades, 0)
        for image, label in zip(found[f"{branch}.images"], asked):
            want = shade(shades[label][dealt[label] % len(shades[label])])
            dealt[label] += 1
            assert (image - want).abs().max() < 1e-5
    if method != "spare":
        return
    # only of the concept: what is kept is drawn as it would be without any images
    flat = {**images, "source": str(tmp_path / "data" / "0")}
    half = pool_of(train(tiny_recipe(**keys, images=flat, output=str(tmp_path / "flat")), quiet=True).run_dir)
    plain = pool_of(train(tiny_recipe(**keys, images=images, output=str(tmp_path / "plain")), quiet=True).run_dir)
    assert torch.equal(half["retain.images"], plain["retain.images"])
    assert torch.equal(half["forget.images"][::2], found["forget.images"][::2])
    assert torch.equal(half["forget.images"][1::2], plain["forget.images"][1::2])
    assert not torch.equal(half["forget.images"][::2], plain["forget.images"][::2])


def test_a_run_that_goes_on_from_elsewhere_finds_its_images(tiny_recipe, tmp_path, monkeypatch):
    pictures(tmp_path / "data" / "0", [10, 60])
    monkeypatch.chdir(tmp_path)
    keys = {**SMALL, "images": {"source": "data", "samples": 4, "steps": 3}}
    first = train(tiny_recipe(**keys), quiet=True).run_dir
    before = pool_of(first)
    (first / "pool.safetensors").unlink()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    train(tiny_recipe(**{**keys, "steps": 3}), quiet=True)
    after = pool_of(first)
    assert all(torch.equal(before[name], after[name]) for name in before)


def text(model, folder, tmp_path, method="spare"):
    return recipe_from({
        **SMALL, "method": method, "model": str(model), "forget": {"concept": "circle", "captions": CAPTIONS}, "cover": "square",
        "retain": ["a red square on the left", "green star"], "output": str(tmp_path / "run"),
        "images": {"source": str(folder), "samples": 12, "steps": 3}, "evaluate": {"every": 0, "final": 0},
    })  # fmt: skip


def test_captions_say_which_prompt_an_image_is_of(sd1, tmp_path):
    pictures(tmp_path / "data", [0, 120, 250], 40, ["Small  Circle", "green star", "a red circle on the left"])
    recipe = text(sd1, tmp_path / "data", tmp_path)
    found = pool_of(train(recipe, quiet=True).run_dir)
    teacher = load_model(recipe).teacher
    side = 4 * teacher.sample_shape[-1]  # of the tiny VAE's pixels
    encoded = {
        prompt: teacher.to_latents(torch.full((1, 3, side, side), shade(value)))[0]
        for prompt, value in (("small circle", 0), ("green star", 120), (CAPTIONS[0], 250))
    }
    for branch in ("forget", "retain"):
        seen = set()
        every = 2 if branch == "forget" else 1  # the others are drawn of the covers
        for latent, row in zip(found[f"{branch}.images"][::every], found[f"{branch}.c"][::every].tolist()):
            prompt = teacher.table.prompts[row]
            if prompt in encoded:
                seen.add(prompt)
                assert (latent - encoded[prompt]).abs().max() < 1e-4
        assert seen == ({"small circle", CAPTIONS[0]} if branch == "forget" else {"green star"})


def test_what_is_wrong_with_a_folder_is_one_line_and_nothing_is_written(sd1, tiny_recipe, tmp_path):
    pictures(tmp_path / "data", [0], 40, ["a white dog"])
    pictures(tmp_path / "plain", [0], 40)
    pictures(tmp_path / "classes" / "9", [0])
    two = tiny_recipe(**{**SMALL, "forget": [0, 2]}, cover=[1, 1], images=str(tmp_path / "classes"))
    cases = [
        (text(sd1, tmp_path / "data", tmp_path), DataError, "caption 'a white dog' is none of the recipe's"),
        (text(sd1, tmp_path / "plain", tmp_path, "sa"), DataError, "none of its images is of what method sa learns from"),
        (text(sd1, tmp_path / "gone", tmp_path), DataError, "no such folder of images"),
        (tiny_recipe(**SMALL, images=str(tmp_path / "classes")), DataError, "class without a PNG or JPEG image"),
        (two, DataError, "no subfolder for any"),
    ]  # fmt: skip
    for recipe, kind, says in cases:
        with pytest.raises((DataError, RecipeError)) as caught:
            train(recipe, quiet=True)
        assert isinstance(caught.value, kind), says
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()
