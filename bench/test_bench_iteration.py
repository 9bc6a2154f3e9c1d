"""One whole iteration on the digits: the engine against the plain loop of the same mathematics, in one process.

    make bench

The plain loop is the algorithm as a careful reader would write it: one branch after the other, each loss with its own passes,
torch's fused Adam, mask multiplied into the gradient. Both draw their samples inside; batch and networks are the same.
"""

import pytest
import torch

from pecker_fast.config import load_recipe
from pecker_fast.engine import LocalEngine, TrainState
from pecker_fast.engine.state import start_ema
from pecker_fast.loop import iteration
from pecker_fast.losses import generate, generator_loss, noise_loss
from pecker_fast.methods import get_method
from pecker_fast.methods.updates import adam
from pecker_fast.parts import load_parts
from pecker_fast.saliency import make_mask

KEYS = ["mask.samples=256", "output=runs/bench"]
RULES = ["differentiated", "salient_only", "alternating"]


def start(*overrides):
    recipe = load_recipe("digits", [*KEYS, *overrides])
    parts = load_parts(recipe)
    named = parts.generator.named_parameters()
    mask = make_mask(recipe, parts.teacher, parts.score, parts.generator, parts.conditions)
    state = TrainState(
        parts.teacher, parts.score, parts.generator, adam(recipe, parts.score.named_parameters(), recipe.lr.score),
        get_method(recipe.method).updates(recipe, named, mask), start_ema(parts.generator, recipe.ema),
    )  # fmt: skip
    return recipe, LocalEngine(recipe, parts.conditions, torch.device("cpu")), state, mask


class PlainLoop:
    """Differentiated rule, straight from the formulas."""

    def __init__(self):
        self.recipe, self.engine, self.state, mask = start()
        for network in (self.state.teacher, self.state.score, self.state.generator):
            network._forward = lambda x, t, c, unet=network.unet: unet(x, t, class_labels=c).sample
        self.masks = {name: mask.bool(name).float() for name, _ in self.state.generator.named_parameters()}
        self.adams = [
            torch.optim.Adam(network.unet.parameters(), lr, betas=(0.0, 0.999), fused=True)
            for network, lr in (
                (self.state.score, self.recipe.lr.score),
                (self.state.generator, self.recipe.lr.generator),
            )
        ]

    def __call__(self):
        recipe, engine, state = self.recipe, self.engine, self.state
        score_adam, generator_adam = self.adams
        score_adam.zero_grad()
        for branch in ("retain", "forget"):
            b = engine.draw(state, "score", branch)
            with torch.no_grad():
                x_g = generate(state.generator, b.z, b.c_g, recipe.timesteps.init)
            x_t = state.teacher.schedule.add_noise(x_g, b.e, b.t)
            noise_loss(state.score.eps, x_t, b.e, b.t, b.c_g).mean().backward()
        torch.nn.utils.clip_grad_value_(state.score.unet.parameters(), 1.0)
        score_adam.step()
        state.score.unet.requires_grad_(False)
        gradients = {}
        for branch in ("retain", "forget"):
            b = engine.draw(state, "generator", branch)
            generator_adam.zero_grad()
            x_g = generate(state.generator, b.z, b.c_g, recipe.timesteps.init)
            loss = generator_loss(state.teacher, state.score, x_g, b.e, b.t, b.c_g, b.c_p, alpha=recipe.alpha).mean()
            loss.backward()
            gradients[branch] = [p.grad.clone() for p in state.generator.unet.parameters()]
        state.score.unet.requires_grad_(True)
        for (name, p), g_r, g_f in zip(state.generator.named_parameters(), gradients["retain"], gradients["forget"]):
            p.grad = recipe.weights.retain * g_r + recipe.weights.forget * g_f * self.masks[name]
        torch.nn.utils.clip_grad_value_(state.generator.unet.parameters(), 1.0)
        generator_adam.step()
        state.update_ema(recipe.ema)
        state.step += 1


@pytest.mark.parametrize("rule", RULES)
def test_engine(benchmark, rule):
    _, engine, state, _ = start(f"update_rule={rule}")
    benchmark.pedantic(lambda: iteration(engine, state), rounds=30, warmup_rounds=5)


def test_engine_without_mask(benchmark):
    _, engine, state, _ = start("mask.source=none")
    benchmark.pedantic(lambda: iteration(engine, state), rounds=30, warmup_rounds=5)


def test_plain_loop(benchmark):
    benchmark.pedantic(PlainLoop(), rounds=30, warmup_rounds=5)


def test_both_take_the_same_step():
    """The figures above mean something only if one iteration gives the same weights."""
    _, engine, state, _ = start("optimizer.eps=1.0")
    plain = PlainLoop()
    for optimizer in plain.adams:
        optimizer.param_groups[0]["eps"] = 1.0  # so that Adam's update is smooth in the gradient
    before = [p.detach().clone() for _, p in state.generator.named_parameters()]
    iteration(engine, state)
    plain()
    for p, q, b in zip(state.generator.unet.parameters(), plain.state.generator.unet.parameters(), before):
        assert float((p - q).detach().norm()) <= 2e-3 * float((q - b).detach().norm()) + 1e-9
