"""Loading models and drawing from them: what fits is loaded exactly, what does not is refused in one line."""

import json

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

from pecker_fast import draws
from pecker_fast.conditions.classes import class_conditions
from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.files import WEIGHTS_NAME
from pecker_fast.forgetting.samplers import ddim_sample, grid_labels, one_step_sample, save_grid
from pecker_fast.networks.denoiser import load_denoiser


@pytest.fixture
def folder(tmp_path):
    return write_tiny_model(tmp_path / "model", judge=False)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folder_loads_bit_identical(folder):
    denoiser = load_denoiser(folder)
    stored = load_file(folder / "unet" / WEIGHTS_NAME)
    assert all(torch.equal(p, stored[name]) for name, p in denoiser.named_parameters())
    assert denoiser.classes == [0, 1, 2]
    assert denoiser.sample_shape == (1, 8, 8)
    assert not denoiser.unet.training


def test_unet_and_scheduler_may_lie_at_the_top(folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            (flat / file.name).write_bytes(file.read_bytes())
    assert load_denoiser(flat).num_class_embeds == 4


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_class_embeds": None}, "missing|unknown|unconditional"),
        ({"block_out_channels": [10**7, 10**7]}, "block_out_channels is .* each a whole number"),
        ({"block_out_channels": [4, 4]}, "the config wants"),
        ({"layers_per_block": 250}, "asks for a network of at least [0-9,]+ tensors"),
        ({"block_out_channels": "many"}, "block_out_channels is 'many'; expected a list"),
        ({"down_block_types": ["NoSuchBlock", "DownBlock2D"]}, "down_block_types is .* each one of"),
        ({"norm_num_groups": 5}, "not a UNet2DModel diffusers can build"),
        ({"num_class_embeds": 5}, "class_embedding.weight has shape"),
    ],
)
def test_config_that_does_not_fit_is_refused(folder, changes, match):
    edit(folder / "unet" / "config.json", **changes)
    with pytest.raises(ModelError, match=match):
        load_denoiser(folder)


def test_unconditional_model_is_refused(folder):
    edit(folder / "unet" / "config.json", num_class_embeds=None)
    path = folder / "unet" / WEIGHTS_NAME
    save_file({k: v for k, v in load_file(path).items() if not k.startswith("class_embedding")}, path)
    with pytest.raises(ModelError, match="unconditional"):
        load_denoiser(folder)


def test_non_finite_weights_are_refused(folder):
    path = folder / "unet" / WEIGHTS_NAME
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"conv_in.bias holds NaN"):
        load_denoiser(folder)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedule_is_the_schedulers(folder, kind):
    DDPMScheduler(beta_schedule=kind).save_pretrained(folder / "scheduler")
    schedule = load_denoiser(folder).schedule
    want = DDPMScheduler(beta_schedule=kind).alphas_cumprod
    assert torch.allclose(schedule.a.square(), want, atol=1e-6)
    assert torch.allclose(schedule.a.square() + schedule.b.square(), torch.ones_like(want), atol=1e-6)


def test_sigma_of_the_papers_timestep(folder):
    s = load_denoiser(folder).schedule
    assert float(s.b[440] / s.a[440]) == pytest.approx(2.502, abs=5e-4)


def test_unknown_prediction_type_is_refused(folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="flow")
    with pytest.raises(ModelError, match="prediction_type 'flow' is not supported"):
        load_denoiser(folder)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_conversions_are_consistent(tmp_path, kind):
    d = load_denoiser(write_tiny_model(tmp_path / kind, kind, judge=False))
    g = torch.Generator().manual_seed(0)
    x, t, c = torch.randn(3, 1, 8, 8, generator=g), torch.tensor([10, 400, 900]), torch.tensor([0, 1, 2])
    a, b = d.schedule.coefficients(t)
    with torch.no_grad():
        assert torch.allclose(a * d.x0(x, t, c) + b * d.eps(x, t, c), x, atol=1e-4)


def test_guidance_mixes_with_the_null_class(folder):
    d = load_denoiser(folder)
    x, t, c = torch.randn(2, 1, 8, 8), torch.tensor([5, 700]), torch.tensor([0, 2])
    with torch.no_grad():
        null = d.eps(x, t, torch.tensor([3, 3]))
        assert torch.allclose(d.eps(x, t, c, 4.5), null + 4.5 * (d.eps(x, t, c) - null), atol=1e-4)
    d.null_class = None
    with pytest.raises(ModelError, match="null class"):
        d.eps(x, t, c, 2.0)


def test_samples_are_a_function_of_the_seed(folder):
    d = load_denoiser(folder)
    labels = torch.arange(7) % 3
    a = one_step_sample(d, labels, seed=3, t_init=440)
    assert a.shape == (7, 1, 8, 8)
    assert float(a.abs().max()) <= 1
    assert torch.allclose(a, one_step_sample(d, labels, seed=3, t_init=440, batch_size=2), atol=1e-5)
    assert not torch.equal(a, one_step_sample(d, labels, seed=4, t_init=440))
    assert torch.equal(ddim_sample(d, labels, 3, seed=1), ddim_sample(d, labels, 3, seed=1))


def test_draws_differ_by_seed_stream_and_step():
    def first(*key):
        return float(torch.rand(1, generator=draws.generator(*key)))

    values = {first(0, "a", 0), first(1, "a", 0), first(0, "b", 0), first(0, "a", 1)}
    assert len(values) == 4
    assert first(0, "a", 0) in values


def test_grid_is_one_image_with_a_class_a_row(tmp_path):
    from PIL import Image

    labels = grid_labels([2, 5], 3)
    assert labels.tolist() == [2, 2, 2, 5, 5, 5]
    path = save_grid(torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 1, 8, 8), 3, tmp_path / "g.png", scale=2)
    image = Image.open(path)
    assert image.size == (3 * 17 + 1, 2 * 17 + 1)
    assert image.getpixel((2, 2)) == 0
    assert image.getpixel((3 * 17 - 2, 2 * 17 - 2)) == 255


@pytest.mark.parametrize(
    ("forget", "cover", "retain", "match"),
    [
        (10, 1, None, "forget: class 10 is out of range; the model's classes are 0 to 9"),
        (0, 12, None, "cover: class 12 is out of range"),
        (0, 0, None, "cover: class 0 is to be forgotten itself"),
        ([0, 1], [2, 1], None, "cover: class 1 is to be forgotten itself"),
        ([0, 1], [2, 3, 4], None, "3 classes for 2 forget classes"),
        (0, 1, [0, 2], "retain: class 0 is to be forgotten"),
        (list(range(10)), 10, None, "cover: class 10 is out of range"),
        ("a cat", 1, None, "is not a class number"),
    ],
)
def test_conditions_are_checked(forget, cover, retain, match):
    with pytest.raises(RecipeError, match=match):
        class_conditions(forget, cover, retain, list(range(10)))


def test_conditions_pair_forget_with_cover():
    conditions = class_conditions([3, 5], [1, 2], None, list(range(10)))
    c_g, c_p = conditions.draw("forget", 200, draws.generator(0, "x"))
    assert {(int(g), int(p)) for g, p in zip(c_g, c_p)} == {(3, 1), (5, 2)}
    c_g, c_p = conditions.draw("retain", 2000, draws.generator(0, "y"))
    assert torch.equal(c_g, c_p)
    counts = torch.bincount(c_g, minlength=10)
    assert counts[3] == counts[5] == 0
    assert int(counts[counts > 0].min()) > 180  # uniform over eight classes
