"""A contrast of forgetting losses while ψ still is φ: rounding noise, refused; made where ψ has left φ."""

import pytest
import torch

from pecker_fast.engine import LocalEngine
from pecker_fast.errors import RecipeError
from pecker_fast.forgetting import SaliencyPass
from pecker_fast.loading.parts import load_parts
from pecker_fast.recipe import load_recipe
from pecker_fast.runs.start import train

CONTRAST = {"mask": {"score": "forget_loss", "contrast": True}}
NOISE = r"^mask\.contrast: .*rounding noise.*use mask\.score=mse"


@pytest.fixture
def started(tiny_recipe):
    """make(**keys) -> (engine, state) with φ, ψ and θ as a run of one stage starts them."""

    def make(**keys):
        recipe = tiny_recipe(**keys)
        parts = load_parts(recipe)
        engine = LocalEngine(recipe, parts.conditions, torch.device("cpu"))
        return engine, engine.start(parts.teacher, parts.score, parts.generator)

    return make


def moved(network, by):
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in network.named_parameters():
            p.add_(by * torch.randn(p.shape, generator=draw))


def norm_on_retain(engine, state):
    scores = engine.saliency_pass(state).scores("retain", "square")
    return float(torch.stack([score.sum() for _, score in scores.named_scores()]).sum().sqrt())


@pytest.mark.parametrize("keys", [{}, {"precision": "bf16"}, {"score": "lora"}, {"detach_score": True}], ids=str)
def test_one_stage_is_refused(started, keys):
    engine, state = started(**CONTRAST, **keys)
    with pytest.raises(RecipeError, match=NOISE):
        engine.make_mask(state)


def test_what_is_refused_is_noise(started):
    engine, state = started(**CONTRAST)
    noise = norm_on_retain(engine, state)
    moved(state.score, 0.05)
    assert noise < 1e-5 * norm_on_retain(engine, state)


@pytest.mark.parametrize("keys", [{}, {"precision": "bf16"}, {"detach_score": True}], ids=str)
def test_two_stages_are_not(started, keys):
    engine, state = started(**CONTRAST, **keys)
    moved(state.score, 0.05)
    moved(state.generator, 0.05)
    assert engine.make_mask(state) is not None


def test_it_is_the_score_network_that_counts(started):
    """A distilled θ beside a ψ that is φ, or φ but for a last bit here and there: noise as well."""
    engine, state = started(**CONTRAST)
    moved(state.generator, 0.05)
    with pytest.raises(RecipeError, match=NOISE):
        engine.make_mask(state)
    moved(state.score, 1e-9)
    with pytest.raises(RecipeError, match=NOISE):
        engine.make_mask(state)


def test_other_guidance_on_one_side_is_signal(started):
    engine, state = started(**CONTRAST, guidance={"teacher": 1.5})
    assert engine.make_mask(state) is not None


def test_the_noise_prediction_error_has_signal_from_the_start(started):
    engine, state = started(mask={"score": "mse", "contrast": True})
    assert engine.make_mask(state) is not None


@pytest.mark.some(1)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_run_is_refused_before_anything_is_written(tiny_recipe, tmp_path, dry_run):
    with pytest.raises(RecipeError, match=NOISE):
        train(tiny_recipe(**CONTRAST), quiet=True, dry_run=dry_run)
    assert not (tmp_path / "run").exists()
    train(tiny_recipe(**CONTRAST, distill_steps=2), quiet=True, dry_run=True)


@pytest.mark.parametrize("name", ["digits", pytest.param("shapes", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_shipped_recipes_that_contrast_have_signal(name, precision):
    recipe = load_recipe(name, ["batch_size=4", f"precision={precision}"])
    assert recipe.mask.contrast
    parts = load_parts(recipe)
    engine = LocalEngine(recipe, parts.conditions, torch.device("cpu"))
    state = engine.start(parts.teacher, parts.score, parts.generator)
    with engine.autocast():
        engine.saliency_pass(state).check_contrast()
    state.score = parts.teacher.clone()
    if recipe.guidance.teacher == recipe.guidance.score:
        with engine.autocast(), pytest.raises(RecipeError, match=NOISE):
            engine.saliency_pass(state).check_contrast()


def test_the_gate_fails_without_the_check(started, monkeypatch):
    monkeypatch.setattr(SaliencyPass, "check_contrast", lambda self: None)
    engine, state = started(**CONTRAST, precision="bf16")
    assert engine.make_mask(state) is not None  # of noise, in silence
