"""Runs of every method, end to end: what comes out, that stock diffusers draws the same from it, resumes, comparisons."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from many_steps import SMALL, text_recipe
from tiny_models import write_tiny_model
from tiny_text_models import tiny_pipeline

from pecker_fast import unlearn
from pecker_fast.errors import OutputError, RecipeError
from pecker_fast.forgetting import DenoiserObjective, ddim_sample
from pecker_fast.forgetting.methods import METHODS
from pecker_fast.forgetting.samplers import sample_noise
from pecker_fast.loading.parts import load_model
from pecker_fast.recipe import load_recipe, recipe_from, recipe_to_dict, shipped_recipes
from pecker_fast.records import read_metrics
from pecker_fast.report import write_comparison
from pecker_fast.runs import COMPARED, compare_methods, export_run, sample_run
from pecker_fast.runs.prompt_judging import judging_of
from pecker_fast.runs.start import train
from pecker_fast.runs.technique import PeckerFastTechnique

DENOISERS = [name for name, method in METHODS.items() if isinstance(method, DenoiserObjective)]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def keys_of(method):
    """What the method's defaults need on a model without cross-attention."""
    only = {"mask": {**SMALL["mask"], "only": ["*attentions*", "time_embedding.*"]}} if method == "esd" else {}
    return {"method": method, **SMALL, **only}


def unet_of(run):
    return load_file(Path(run) / "pipeline" / WEIGHTS)


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


pytestmark = pytest.mark.usefixtures("no_forecast")


@pytest.mark.some(2)
@pytest.mark.parametrize("method", DENOISERS)
def test_a_run_that_was_cut_in_two_comes_to_the_same_bits(tiny_recipe, tmp_path, method):
    whole = train(tiny_recipe(**keys_of(method), output=str(tmp_path / "whole")), quiet=True)
    assert whole.metrics["before"] == whole.metrics["teacher"]
    assert not (tmp_path / "whole" / "checkpoints" / "step-000004" / "score.safetensors").exists()
    train(tiny_recipe(**{**keys_of(method), "steps": 2}, output=str(tmp_path / "cut")), quiet=True)
    recipe = tiny_recipe(**keys_of(method), output=str(tmp_path / "cut"))
    pool = tmp_path / "cut" / "pool.safetensors"
    if recipe.images.source == "pool":
        assert pool.is_file()
        pool.write_bytes(pool.read_bytes()[:-4] + b"oops")  # a changed pool is drawn again
    train(recipe, quiet=True)
    assert same(unet_of(tmp_path / "whole"), unet_of(tmp_path / "cut"))
    start = load_file(Path(recipe.model) / WEIGHTS)
    assert not same(unet_of(tmp_path / "whole"), start)


def test_a_result_of_many_steps_is_a_model_as_its_base_was(tiny_recipe, tmp_path):
    from diffusers import DDIMScheduler, UNet2DModel

    recipe = tiny_recipe(**keys_of("spare"))
    run = train(recipe, quiet=True).run_dir
    pipeline = run / "pipeline"
    about = json.loads((pipeline / "model.json").read_text())
    assert about["kind"] == "model of many steps"
    assert "t_init" not in about
    base = Path(recipe.model) / "scheduler" / "scheduler_config.json"
    assert json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text()) == json.loads(base.read_text())
    card = (pipeline / "README.md").read_text()
    assert "# Diffusion model that" in card
    assert "one-step" not in card
    # the sampler of the card draws what ours does
    code = card.split("```python\n")[1].split("```")[0].replace("'pipeline'", repr(str(pipeline)))
    drawn = {}
    exec(code, drawn)
    result = load_model(recipe.model_copy(update={"model": str(pipeline)}))
    unet = UNet2DModel.from_pretrained(pipeline, subfolder="unet")
    assert same(unet.state_dict(), unet_of(run))
    scheduler = DDIMScheduler.from_pretrained(pipeline, subfolder="scheduler", timestep_spacing="trailing")
    labels = torch.tensor([0, 1, 2])
    for steps in (20, 50):
        scheduler.set_timesteps(steps)
        x = sample_noise(result.teacher, 3, seed=4)
        for t in scheduler.timesteps:
            with torch.no_grad():
                x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
        ours = ddim_sample(result.teacher, labels, steps, seed=4)
        assert (x.clamp(-1, 1) - ours).abs().max() < 1e-3
    assert sample_run(run, count=2).is_file()
    # and it can forget more
    more = train(
        tiny_recipe(**keys_of("spare"), model=str(pipeline), forget=1, cover=2, output=str(tmp_path / "more")),
        quiet=True,
    )
    assert (more.run_dir / "pipeline").is_dir()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_pipeline(folder / kind, kind) for kind in ("sd1", "sdxl")}


@pytest.mark.some(1)
@pytest.mark.parametrize(("kind", "method"), [("sd1", "spare"), ("sdxl", "esd"), ("sd1", "uce")])
def test_a_text_result_is_drawn_by_every_stock_sampler(models, tmp_path, kind, method):
    import diffusers

    steps = {"steps": 0} if method == "uce" else {}
    recipe = text_recipe(models[kind], tmp_path / "run", method=method, **steps)
    run = train(recipe, quiet=True).run_dir
    pipe = diffusers.DiffusionPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    base = diffusers.DiffusionPipeline.from_pretrained(models[kind])
    assert type(pipe) is type(base)
    assert dict(pipe.scheduler.config) == dict(base.scheduler.config)
    assert not same(pipe.unet.state_dict(), base.unet.state_dict())
    size = 32
    for sampler in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        pipe.scheduler = getattr(diffusers, sampler).from_config(pipe.scheduler.config)
        for guidance in (1.0, 7.5):
            call = {
                "num_inference_steps": 20,
                "guidance_scale": guidance,
                "height": size,
                "width": size,
                "output_type": "pt",
            }
            images = pipe("a red circle", generator=torch.Generator().manual_seed(1), **call).images
            assert bool(torch.isfinite(images).all()), (sampler, guidance)
    # our own sampler beside diffusers'
    result = load_model(recipe.model_copy(update={"model": str(run / "pipeline")}))
    teacher = result.teacher
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    prompt = "a red square"
    z = sample_noise(teacher, 1, seed=3)
    theirs = pipe(
        prompt, num_inference_steps=20, guidance_scale=1.0, latents=z, height=4 * z.shape[-2], width=4 * z.shape[-1],
        output_type="pt",
    ).images * 2 - 1  # fmt: skip
    if not getattr(
        diffusers.DDIMScheduler.from_pretrained(models[kind], subfolder="scheduler").config, "clip_sample", False
    ):
        ours = ddim_sample(teacher, torch.tensor(teacher.table.index([prompt])), 20, seed=3)
        assert (ours - theirs).abs().max() / 2 < 1e-3  # of the range of a picture


@pytest.mark.some(2)
@pytest.mark.parametrize("names", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_lora_file_makes_the_base_the_result(models, tmp_path, kind, names):
    """Of full rank, on a change that biases and norms have no part in: the same network to rounding."""
    only = {"source": "names", "only": ["*to_q.weight", "*to_v.weight", "*conv1.weight"]}
    recipe = text_recipe(models[kind], tmp_path / "run", method="spare", mask=only, lr={"generator": 1e-2})
    run = train(recipe, quiet=True).run_dir
    file = export_run(run, tmp_path / "lora.safetensors", form="lora", rank=4096, names=names)
    tensors = load_file(file)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        assert float(opened.metadata()["error"]) < 1e-5
    result, base = unet_of(run), load_file(Path(models[kind]) / WEIGHTS)
    for name in (name for name in base if not torch.equal(base[name], result[name])):
        layer = name.removesuffix(".weight")
        stem = (
            f"unet.{layer}.lora_{{}}.weight"
            if names == "diffusers"
            else f"lora_unet_{layer.replace('.', '_')}.lora_{{}}.weight"
        )
        down, up = (tensors[stem.format(part)] for part in (("A", "B") if names == "diffusers" else ("down", "up")))
        product = (up.flatten(1) @ down.flatten(1)).view_as(base[name])
        change = result[name].float() - base[name].float()
        assert (product - change).norm() <= 1e-4 * change.norm(), name
    pytest.importorskip("peft")
    import diffusers

    pipes = [diffusers.DiffusionPipeline.from_pretrained(folder) for folder in (models[kind], run / "pipeline")]
    pipes[0].load_lora_weights(str(file))
    call = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 32, "width": 32, "output_type": "pt"}
    drawn = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        drawn.append(pipe("a red circle", generator=torch.Generator().manual_seed(1), **call).images)
    assert (drawn[0] - drawn[1]).abs().max() < 1e-3


def test_a_lora_says_what_it_does_not_hold(models, tmp_path, capsys):
    run = train(
        text_recipe(models["sd1"], tmp_path / "run", method="spare", lr={"generator": 1e-2}), quiet=True
    ).run_dir
    capsys.readouterr()
    export_run(run, tmp_path / "small.safetensors", form="lora", rank=1)
    said = capsys.readouterr().err
    assert "layers of rank up to 1" in said
    assert "% of the change is not in it" in said
    assert "of biases and norms" in said
    with pytest.raises(RecipeError, match="rank: 0; give at least 1"):
        export_run(run, tmp_path / "none.safetensors", form="lora", rank=0)
    with pytest.raises(RecipeError, match="names: 'webui'; give one of diffusers, kohya"):
        export_run(run, tmp_path / "none.safetensors", form="lora", names="webui")
    assert not (tmp_path / "none.safetensors").exists()


def test_the_plain_call_of_a_one_step_result_draws_right(models, tmp_path):
    import diffusers

    keys = {"method": "pecker", "timesteps": {"init": 625, "min": 20, "max": 980}}
    recipe = text_recipe(models["sd1"], tmp_path / "run", **keys)
    run = train(recipe, quiet=True).run_dir
    pipe = diffusers.DiffusionPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    call = {
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "latents": z,
        "height": 32,
        "width": 32,
        "output_type": "pt",
    }
    plain, told = (pipe("green star", **call, **more).images for more in ({}, {"timesteps": [625]}))
    assert torch.equal(plain, told)
    assert pipe.scheduler.timesteps.tolist() == [625]
    technique = PeckerFastTechnique(run=str(run))
    first, second = technique.generate(["green star", "green star"], seed=3, num_inference_steps=50)
    assert first.size == second.size
    assert first.tobytes() != second.tobytes()
    assert technique.generate(["green star"], seed=3)[0].tobytes() == first.tobytes()
    with pytest.raises(OutputError, match="not a run folder"):
        PeckerFastTechnique(run=str(tmp_path))


def test_python_serves_every_method(tiny_recipe, tmp_path):
    base = tiny_recipe()
    for method in ("relabel", "salun"):
        steps = (
            {} if method == "relabel" else {"steps": 2, "images": {"samples": 4, "steps": 2}, "mask": {"samples": 4}}
        )
        result = unlearn(
            base.model, forget=0, cover=1, method=method, output=tmp_path / method, recipe=base,
            evaluate={"every": 0, "final": 4, "teacher_steps": 2}, **steps,
        )  # fmt: skip
        assert recipe_to_dict(load_recipe(result.run_dir / "recipe.yaml"))["method"] == method
        assert result.metrics["after"]["samples"] == 4


def test_a_recipe_of_another_method_keeps_the_task_and_not_the_settings():
    ours = load_recipe("digits_paper", ["method=salun", "forget=3", "cover=8", "lr.generator=1e-5"])
    plain = recipe_from({"method": "salun"})
    assert (ours.forget, ours.cover, ours.lr.generator) == (3, 8, 1e-5)
    assert (ours.steps, ours.mask, ours.generator, ours.batch_size) == (plain.steps, plain.mask, None, plain.batch_size)
    assert load_recipe("digits", ["method=sfd"]).steps == load_recipe("digits").steps  # they share their settings
    own = [
        (base, method)
        for base in ("digits", "shapes")
        for method in ("spare", "salun", "esd", "sa")
        if f"{base}_{method}" in shipped_recipes()
    ]
    assert len(own) == 8
    for base, method in own:
        assert load_recipe(base, [f"method={method}"]) == load_recipe(f"{base}_{method}")


def test_a_comparison_has_a_row_of_a_model_that_never_knew(tiny_model, tmp_path, monkeypatch):
    other = write_tiny_model(tmp_path / "other", seed=1)
    recipe = tmp_path / "task.yaml"
    recipe.write_text(
        f"model: {tiny_model}\nforget: 0\ncover: 1\nevaluate: {{every: 0, final: 12, teacher_steps: 2}}\nbatch_size: 4\nsteps: 2\n"
        "mask: {samples: 8}\n"
    )
    asked = {"output": tmp_path / "all", "never": str(other)}
    found = compare_methods(recipe, ["relabel"], **asked)
    last = found["rows"][-1]
    assert (last["method"], last["result"], last["training_s"]) == ("never knew", "never", None)
    task = recipe_from({"model": str(tiny_model), "forget": 0, "cover": 1, "method": "spare",
                        "evaluate": {"teacher_steps": 2}})  # fmt: skip
    base, twin = (load_model(task.model_copy(update={"model": str(m)})) for m in (tiny_model, other))
    want = judging_of(task, base).figures(judging_of(task, twin).multi_step(), 12)
    assert last["ua"]["mean"] == want["ua"]
    teacher = judging_of(task, base).figures(judging_of(task, base).multi_step(), 12)
    assert last["fid_ratio"]["mean"] == pytest.approx(want["fid"] / teacher["fid"])
    assert (tmp_path / "all" / "never-knew" / "samples" / "after.png").is_file()
    assert "never knew" in write_comparison(found, COMPARED, tmp_path / "all").read_text()
    monkeypatch.setattr("pecker_fast.runs.yardsticks.load_model", None)  # judged once
    assert compare_methods(recipe, ["relabel"], **asked)["rows"] == found["rows"]
    with pytest.raises(RecipeError, match="--methods: sld steers prompts away from a concept"):
        compare_methods(recipe, ["relabel", "sld"], output=tmp_path / "none")
    with pytest.raises(RecipeError, match="method: uce edits cross-attention, and this model draws from classes"):
        compare_methods(recipe, ["relabel", "uce"], output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_comparison_has_a_row_of_steered_sampling(models, tmp_path):
    recipe = tmp_path / "task.yaml"
    recipe.write_text(json.dumps(recipe_to_dict(text_recipe(models["sd1"], tmp_path / "x", method="uce", steps=0))))
    found = compare_methods(recipe, ["uce", "sld"], output=tmp_path / "all")
    assert [(row["method"], row["result"]) for row in found["rows"]] == [("uce", "edit"), ("sld", "sampling")]
    assert (tmp_path / "all" / "sld" / "samples" / "after.png").is_file()
    assert "many steps, steered" in write_comparison(found, COMPARED, tmp_path / "all").read_text()


def test_methods_are_compared_in_one_table(tiny_model, tmp_path, capsys):
    recipe = tmp_path / "task.yaml"
    recipe.write_text(
        f"model: {tiny_model}\nforget: 0\ncover: 1\nevaluate: {{every: 0, final: 12, teacher_steps: 2}}\nbatch_size: 4\nsteps: 2\n"
        "mask: {samples: 8}\n"
    )
    lines = []
    asked = {"seeds": 2, "output": tmp_path / "all", "overrides": ["cover=2"], "say": lines.append}
    found = compare_methods(recipe, ["pecker", "relabel"], **asked)
    assert lines == ["1/4: pecker, seed 0", "2/4: pecker, seed 1", "3/4: relabel, seed 0", "4/4: relabel, seed 1"]
    assert [row["method"] for row in found["rows"]] == ["pecker", "relabel"]
    for row in found["rows"]:
        runs = [run for run in found["runs"] if run["method"] == row["method"]]
        values = [run["ua"] for run in runs]
        assert row["ua"] == {"mean": sum(values) / 2, "low": min(values), "high": max(values), "n": 2}
        for run in runs:
            metrics = read_metrics(Path(run["run"]))
            assert run["ua"] == metrics["after"]["ua"]
            assert run["training_s"] == metrics["cost"]["training_s"]
    base, result = load_file(tiny_model / WEIGHTS), unet_of(tmp_path / "all" / "relabel-0")
    differ = sum(int((base[name] != result[name]).sum()) for name in base)
    total = sum(t.numel() for t in base.values())
    assert found["rows"][1]["moved"]["mean"] == pytest.approx(differ / total)
    page = write_comparison(found, COMPARED, tmp_path / "all")
    table = (tmp_path / "all" / "compare.md").read_text()
    assert table.count("\n| ") == 2
    assert "relabel" in page.read_text()
    # taken up: nothing is trained again
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").glob("*/pipeline/unet/*.safetensors")}
    assert len(before) == 4
    shutil.rmtree(tmp_path / "all" / "pecker-1")
    assert compare_methods(recipe, ["pecker", "relabel"], **asked)["rows"][1] == found["rows"][1]
    kept = {path: path.stat().st_mtime_ns for path in before if path.exists() and "pecker-1" not in str(path)}
    assert all(before[path] == when for path, when in kept.items())
    with pytest.raises(RecipeError, match="--methods: 'peker' is unknown, did you mean pecker"):
        compare_methods(recipe, ["peker"], output=tmp_path / "none")
    with pytest.raises(RecipeError, match="override seed=3: compare chooses it itself"):
        compare_methods(recipe, ["pecker"], output=tmp_path / "none", overrides=["seed=3"])
    assert not (tmp_path / "none").exists()
