"""CLIP score: against transformers' own pipeline of the same folder, and what is no CLIP folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_text_models import tiny_clip

from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.evaluate import Prompt, clip_score, load_clip, protocol_table

TEXTS = ["a red circle", "small star", "a white dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip") / "model")


def images_of(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(len(rows), 3, 30, 40, generator=draw) * 2 - 1


def theirs(folder, images, texts):
    """Cosines as a user of transformers would take them, one image at a time from a picture."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer, pixels = CLIPTokenizer.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
    found = []
    for image, text in zip(images, texts):
        picture = Image.fromarray(((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())
        with torch.no_grad():
            out = model(**tokenizer([text], return_tensors="pt"), **pixels(picture, return_tensors="pt"))
        found.append(float(out.logits_per_image / model.logit_scale.exp()))
    return found


def test_similarities_are_those_of_transformers(folder):
    images = images_of(range(3), 1)
    found = load_clip(folder)(images, TEXTS)
    assert np.allclose(found.numpy(), theirs(folder, images, TEXTS), atol=2e-3)
    assert (found[0] - load_clip(folder)(images[:1], ["small star"])[0]).abs() > 1e-4  # the text counts


def test_scores_of_groups_are_means_over_their_images(folder):
    prompts = [Prompt(i, text) for i, text in enumerate(TEXTS)]
    groups = {
        "forget": (prompts[:1], TEXTS[:1]),
        "forget:cover": (prompts[:1], ["green square"]),
        "retain": (prompts[1:], TEXTS[1:]),
    }
    drawn = []

    def sampler(rows, seed):
        images = images_of(rows, seed)
        drawn.append((rows.tolist(), images))
        return images

    similarity = load_clip(folder)
    found = clip_score(sampler, groups, similarity, 6, seed=3)
    assert drawn[0][0] == [0] * 6  # drawn once for two texts
    assert sorted(drawn[1][0]) == [1, 1, 1, 2, 2, 2]
    for name, (rows, images), text in (
        ("forget", drawn[0], None), ("forget:cover", drawn[0], "green square"), ("retain", drawn[1], None)
    ):  # fmt: skip
        values = 100 * similarity(images, [text or TEXTS[row] for row in rows]).clamp(min=0)
        mean, low = float(values.mean()), float(values.mean() - 1.96 * values.std() / 6**0.5)
        assert found["clip_score"][name] == pytest.approx(mean, abs=1e-4)
        assert found["intervals"]["clip_score"][name][0] == pytest.approx(low, abs=1e-4)
    rows = protocol_table(found)
    assert [row[0] for row in rows] == ["CLIP score: forget", "CLIP score: forget:cover", "CLIP score: retain"]
    with pytest.raises(RecipeError, match="clip: needs samples"):
        clip_score(sampler, groups, similarity, 0)
    with pytest.raises(ModelError, match="a similarity is not a finite number"):
        clip_score(sampler, groups, lambda images, texts: torch.full((len(texts),), float("nan")), 2)


def test_what_is_no_clip_folder_is_one_line(folder, tmp_path):
    with pytest.raises(ModelError, match="no such folder; give one with a CLIPModel"):
        load_clip(tmp_path / "none")
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ModelError, match="its model_type is 'bert', not clip"):
        load_clip(other)
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="not a CLIP model with tokenizer and preprocessor") as caught:
        load_clip(pickled)
    assert "\n" not in str(caught.value)
