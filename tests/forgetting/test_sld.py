"""Sampling that is steered away from a concept, against the paper's equations written out in float64."""

import pytest
import torch
from tiny_text_models import tiny_pipeline

from pecker_fast.forgetting import ddim_sample
from pecker_fast.forgetting.samplers import ddim_scheduler, sample_noise
from pecker_fast.forgetting.sld import Sld, away, sld_sample
from pecker_fast.loading.parts import load_model
from pecker_fast.recipe import recipe_from

OPTIONS = Sld(scale=30.0, warmup=2, threshold=0.01, momentum=0.4, beta=0.7)


def test_guidance_is_the_papers():
    draw = torch.Generator().manual_seed(0)
    e_p, e_0, e_s, held = (torch.randn(2, 1, 4, 4, generator=draw) * 0.05 for _ in range(4))
    gamma, after = away(e_p, e_0, e_s, held, OPTIONS)
    for p, zero, s, v, g, next_v in zip(*(x.double().flatten().tolist() for x in (e_p, e_0, e_s, held, gamma, after))):
        mu = min(1.0, abs(OPTIONS.scale * (p - s))) if p - s < OPTIONS.threshold else 0.0
        want = mu * (s - zero) + OPTIONS.momentum * v
        assert g == pytest.approx(want, abs=1e-6)
        assert next_v == pytest.approx(OPTIONS.beta * v + (1 - OPTIONS.beta) * want, abs=1e-6)
    assert (gamma - OPTIONS.momentum * held == 0).any()  # some are above the threshold, some below
    assert (gamma - OPTIONS.momentum * held != 0).any()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    model = tiny_pipeline(tmp_path_factory.mktemp("models") / "sd1", "sd1")
    recipe = recipe_from({
        "model": str(model), "forget": {"concept": "circle", "captions": ["a red circle", "small circle"]}, "cover": "square",
        "retain": ["green star"],
    })  # fmt: skip
    return load_model(recipe, prompts=["circle"]).teacher


def test_samples_are_those_of_a_sampler_written_out(teacher):
    labels = torch.tensor(teacher.table.index(["a red circle", "green star"]))
    (concept,) = teacher.table.index(["circle"])
    steps, guidance, seed = 5, 60.0, 4
    scheduler, x = ddim_scheduler(teacher, steps), sample_noise(teacher, 2, seed)
    held = torch.zeros_like(x, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        at = t.expand(2)
        with torch.no_grad():
            e_p, e_0, e_s = (
                teacher.output(x, at, c).double()
                for c in (labels, torch.full_like(labels, teacher.null_class), torch.full_like(labels, concept))
            )
        mu = torch.where(e_p - e_s < OPTIONS.threshold, (OPTIONS.scale * (e_p - e_s)).abs().clamp(max=1), 0.0)
        gamma = mu * (e_s - e_0) + OPTIONS.momentum * held
        held = OPTIONS.beta * held + (1 - OPTIONS.beta) * gamma
        step = e_0 + guidance * (e_p - e_0 - (gamma if i >= OPTIONS.warmup else 0))
        x = scheduler.step(step.float(), t, x).prev_sample
    want = teacher.to_images(x)
    found = sld_sample(teacher, labels, concept, steps, seed, guidance, OPTIONS)
    error = (found - want).abs().max()
    assert error < 1e-3
    plain = ddim_sample(teacher, labels, steps, seed, guidance=guidance)
    assert (found - plain).abs().max() > 20 * error
    late = sld_sample(teacher, labels, concept, steps, seed, guidance, Sld(warmup=steps))
    assert (late - plain).abs().max() < 1e-3
