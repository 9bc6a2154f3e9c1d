"""Runs whose θ is adapters (`student: lora`): what moves, resumes, what a LoRA file holds, every kind of method."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from many_steps import text_recipe

from pecker_fast.errors import RecipeError
from pecker_fast.networks import AdaptedUNet
from pecker_fast.recipe import recipe_from
from pecker_fast.runs import export_run, sample_run
from pecker_fast.runs.start import train

SMALL = {
    "steps": 4, "batch_size": 4, "images": {"samples": 6, "steps": 3}, "mask": {"samples": 8}, "student": "lora",
    "lora": {"rank": 2}, "lr": {"generator": 1e-2}, "update_rule": "salient_only",
}  # fmt: skip
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


pytestmark = pytest.mark.usefixtures("no_forecast")


def keys(method, **more):
    given = {**SMALL, "method": method}
    for key, value in more.items():
        given[key] = {**given[key], **value} if isinstance(value, dict) and isinstance(given.get(key), dict) else value
    return given


def lora_recipe(model, output, **more):
    return text_recipe(model, output, **keys("spare", **more))


def weights(folder):
    return load_file(Path(folder) / WEIGHTS)


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("spare", {"mask": {"structure": "element", "density": 0.1}}),
        ("spare", {"mask": {"structure": "row", "density": 0.2}, "adversary": {"conditions": 2, "batch": 2, "samples": 4}}),
        ("pecker", {"score": "lora", "mask": {"structure": "tensor", "density": 0.3}}),
    ],
)  # fmt: skip
def test_what_is_outside_the_mask_stays_and_a_cut_run_comes_to_the_same_bits(tiny_recipe, tmp_path, method, more):
    recipe = tiny_recipe(**keys(method, **more), output=str(tmp_path / "whole"))
    whole = train(recipe, quiet=True)
    proof = whole.metrics["outside_mask"]
    assert proof["before_sha256"] == proof["after_sha256"]
    start, now = weights(recipe.model), weights(whole.run_dir / "pipeline")
    changed = sum(int((start[name] != now[name]).sum()) for name in start)
    total = sum(p.numel() for p in start.values())
    assert 0 < changed <= total - proof["weights"] <= (more["mask"]["density"] + 0.1) * total
    kept = load_file(whole.run_dir / "checkpoints" / "step-000004" / "generator.safetensors")
    assert all(name.rpartition(".")[2] in ("lora_a", "lora_b") for name in kept)
    train(tiny_recipe(**{**keys(method, **more), "steps": 2}, output=str(tmp_path / "cut")), quiet=True)
    train(tiny_recipe(**keys(method, **more), output=str(tmp_path / "cut")), quiet=True)
    again = weights(tmp_path / "cut" / "pipeline")
    assert all(torch.equal(now[name], again[name]) for name in now)
    exported = export_run(whole.run_dir, tmp_path / "unet.safetensors", form="unet")
    assert all(torch.equal(now[name], tensor) for name, tensor in load_file(exported).items())
    assert sample_run(whole.run_dir, count=2).is_file()


@pytest.mark.books
@pytest.mark.parametrize("structure", ["element", pytest.param("row", marks=pytest.mark.slow)])
def test_books_are_kept_of_adapters_too(tiny_recipe, structure):
    result = train(tiny_recipe(**keys("spare", mask={"structure": structure, "density": 0.2})), quiet=True)
    assert result.metrics["cost"]["flops"] > 0
    assert result.metrics["cost"]["parts"]


@pytest.mark.some(2)
@pytest.mark.parametrize("structure", ["row", "tensor", None])
@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_the_lora_file_of_a_student_is_its_adapters(sd1, tmp_path, structure, names):
    mask = {"source": "none"} if structure is None else {"structure": structure, "density": 0.2}
    run = train(lora_recipe(sd1, tmp_path / "run", mask=mask), quiet=True).run_dir
    file = export_run(run, tmp_path / "lora.safetensors", form="lora", names=names)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["error"] == "0"
        assert opened.metadata()["rank"] == "2"
    tensors, base, result = load_file(file), weights(sd1), weights(run / "pipeline")
    moved = {name for name in base if not torch.equal(base[name], result[name])}
    parts = ("A", "B") if names == "diffusers" else ("down", "up")
    stems = {name: f"unet.{name.removesuffix('.weight')}.lora_{{}}.weight" if names == "diffusers"
             else f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.lora_{{}}.weight" for name in base}  # fmt: skip
    held = {name for name in base if stems[name].format(parts[0]) in tensors}
    assert moved <= held
    for name in held:
        down, up = (tensors[stems[name].format(part)] for part in parts)
        assert len(down) <= 2
        product = (up.flatten(1) @ down.flatten(1)).view_as(base[name])
        assert torch.allclose(base[name] + product, result[name], atol=1e-6)
    if names == "kohya":
        assert all(float(tensors[key]) == len(tensors[key.replace("alpha", "lora_down.weight")])
                   for key in tensors if key.endswith("alpha"))  # fmt: skip


def test_single_weights_of_products_are_no_product(sd1, tmp_path, capsys):
    """The file of an element mask is a truncated one, and says so; at full rank nothing is lost."""
    run = train(lora_recipe(sd1, tmp_path / "run", mask={"density": 0.1}), quiet=True).run_dir
    capsys.readouterr()
    export_run(run, tmp_path / "small.safetensors", form="lora", rank=1)
    assert "% of the change is not in it" in capsys.readouterr().err
    with safe_open(tmp_path / "small.safetensors", "pt") as opened:
        assert float(opened.metadata()["error"]) > 0.01
    export_run(run, tmp_path / "whole.safetensors", form="lora", rank=4096)
    with safe_open(tmp_path / "whole.safetensors", "pt") as opened:
        assert float(opened.metadata()["error"]) < 1e-5


def test_a_lora_file_draws_what_its_run_draws(sd1, tmp_path):
    pytest.importorskip("peft")
    import diffusers

    run = train(lora_recipe(sd1, tmp_path / "run", mask={"structure": "row", "density": 0.3}), quiet=True).run_dir
    file = export_run(run, tmp_path / "lora.safetensors", form="lora")
    call = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 32, "width": 32, "output_type": "pt"}
    drawn = []
    for folder, lora in ((sd1, None), (sd1, file), (run / "pipeline", None)):
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        if lora:
            pipe.load_lora_weights(str(lora))
        drawn.append(pipe("a red circle", generator=torch.Generator().manual_seed(1), **call).images)
    assert (drawn[1] - drawn[2]).abs().max() < 1e-3
    assert (drawn[0] - drawn[2]).abs().max() > 1e-3


def test_adapters_share_the_teachers_weights(tiny_recipe):
    from pecker_fast.loading import load_parts

    parts = load_parts(tiny_recipe(**keys("pecker", score="lora")))
    assert isinstance(parts.generator.unet, AdaptedUNet)
    assert parts.generator.unet.base is parts.teacher.unet
    assert parts.score.unet.base is parts.teacher.unet


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"method": "relabel", "steps": 0, "ema": 0}, "student: method relabel changes weights in closed form"),
        ({"method": "pecker", "distill_steps": 3}, "student: adapters stand on a distilled generator"),
        ({"engine": {"zero": 2}}, "engine.zero: adapters are few"),
        ({"mask": {"refresh": 2}}, "mask.refresh: adapters stand where the first mask says"),
        ({"update_rule": "alternating"}, "update_rule: the mask of a LoRA student is in its product"),
        ({"engine": {"compile": "blocks"}}, "engine.compile: adapters change their layers"),
        ({"method": "sa"}, "student: the springs of method sa hold weights"),
        ({"mask": {"only": ["conv_norm_out.*"]}}, "mask.exclude: leaves no tensor for the mask"),
    ],
)
def test_what_adapters_cannot_is_one_line(tiny_model, tmp_path, more, says):
    given = {**keys(more.pop("method", "spare"), **more), "model": str(tiny_model), "output": str(tmp_path / "run")}
    with pytest.raises(RecipeError, match=says) as caught:
        train(recipe_from(given), quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
