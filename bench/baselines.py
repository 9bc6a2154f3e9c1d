"""The loops that an iteration of the engine is measured against, of the same mathematics and on the same draws.

PlainLoop: the algorithm as a careful reader would write it with diffusers, torch and fused Adam, one branch after the other.
UpstreamLoop: the same, run as the official Score Forgetting Distillation script runs it: unfused Adam, every loss read on the
host, gradients cleaned and clipped parameter by parameter, text encoded on every call, garbage collected and the cache emptied
twice an iteration, TF32 off, an average kept by a loop over parameters.

Both call the UNet directly and take their formulas from the paper, not from pecker_fast; only networks, draws and settings are
shared. `rule`: "dense" (no mask), "differentiated" (mask on the forget gradient), "salient_only" (mask on the whole gradient).
test_bench_iteration.py shows that each takes the engine's step before it is timed.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from pecker_fast.runs.benchmark import Setup

RULES = ("dense", "differentiated", "salient_only")
Encode = Callable[[Tensor], Tensor]  # condition -> what the UNet is told; class labels need no encoder


def samples_of(x_t: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The conditional mean of x_0 from predicted noise."""
    return (x_t - b * eps) / a


class PlainLoop:
    """One iteration a call. `setup` is its own: θ, ψ and the average move."""

    fused: bool | None = True
    foreach: bool | None = None

    def __init__(self, setup: Setup, rule: str, encode: Encode = lambda c: c) -> None:
        recipe, state = setup.recipe, setup.state
        assert rule in RULES
        assert recipe.guidance.score_train == recipe.guidance.score == recipe.guidance.teacher == 1
        assert recipe.guidance.text_dropout == 0
        assert state.teacher.schedule.prediction_type == "epsilon"
        self.recipe, self.engine, self.state, self.rule, self.encode = recipe, setup.engine, state, rule, encode
        self.phi, self.psi, self.theta = state.teacher.unet, state.score.unet, state.generator.unet
        self.phi.requires_grad_(False)
        self.a, self.b = state.teacher.schedule.a, state.teacher.schedule.b  # √ᾱ_t and √(1−ᾱ_t)
        self.masks: list[Tensor] = []
        if rule != "dense":
            assert setup.mask is not None
            self.masks = [setup.mask.bool(name).to(p) for name, p in self.theta.named_parameters()]
        self.psi_adam = self.adam(self.psi.parameters(), recipe.lr.score)
        self.theta_adam = self.adam(self.theta.parameters(), recipe.lr.generator)

    def adam(self, parameters: Iterable[Tensor], lr: float) -> torch.optim.Adam:
        options = self.recipe.optimizer
        return torch.optim.Adam(
            parameters, lr, betas=tuple(options.betas), eps=options.eps, weight_decay=options.weight_decay,
            fused=self.fused, foreach=self.foreach,
        )  # fmt: skip

    # -- the formulas --------------------------------------------------------------------------------------------

    def eps(self, unet: torch.nn.Module, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return unet(x_t, t, class_labels=self.encode(c)).sample

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.a[t].view(-1, 1, 1, 1), self.b[t].view(-1, 1, 1, 1)

    def generate(self, z: Tensor, c: Tensor) -> Tensor:
        """One step from noise: x_init = b_init z."""
        t = torch.full((len(z),), self.recipe.timesteps.init, device=z.device)
        a, b = self.coefficients(t)
        return samples_of(b * z, self.eps(self.theta, b * z, t, c), a, b)

    def score_loss(self, branch: str) -> Tensor:
        draw = self.engine.draw(self.state, "score", branch)
        with torch.no_grad():
            x_g = self.generate(draw.z, draw.c_g)
        a, b = self.coefficients(draw.t)
        error = draw.e - self.eps(self.psi, a * x_g + b * draw.e, draw.t, draw.c_s)
        return error.square().flatten(1).sum(1).mean()

    def generator_loss(self, branch: str) -> Tensor:
        draw = self.engine.draw(self.state, "generator", branch)
        x_g = self.generate(draw.z, draw.c_g)
        a, b = self.coefficients(draw.t)
        x_t = a * x_g + b * draw.e
        f_phi = samples_of(x_t, self.eps(self.phi, x_t, draw.t, draw.c_p), a, b)
        f_psi = samples_of(x_t, self.eps(self.psi, x_t, draw.t, draw.c_s), a, b)
        omega = (f_phi - x_g).detach().abs().flatten(1).mean(1).clamp_min(1e-5)
        product = (f_phi - f_psi) * ((f_phi - x_g) - self.recipe.alpha * (f_phi - f_psi))
        return (product.flatten(1).sum(1) / omega).mean()

    # -- the loop ------------------------------------------------------------------------------------------------

    def __call__(self) -> None:
        w = self.recipe.weights
        self.psi_adam.zero_grad()
        for branch, weight in (("retain", w.score_retain), ("forget", w.score_forget)):
            self.backward(weight * self.score_loss(branch))
        self.step(self.psi, self.psi_adam)
        self.between()

        self.psi.requires_grad_(False)
        self.theta_adam.zero_grad()
        self.backward(w.retain * self.generator_loss("retain"))
        if self.rule == "differentiated":
            retain = [p.grad for p in self.theta.parameters()]
            self.theta_adam.zero_grad()
            self.backward(w.forget * self.generator_loss("forget"))
            for p, g, m in zip(self.theta.parameters(), retain, self.masks):
                p.grad.mul_(m).add_(g)
        else:
            self.backward(w.forget * self.generator_loss("forget"))
            for p, m in zip(self.theta.parameters(), self.masks):
                p.grad.mul_(m)
        self.psi.requires_grad_(True)
        self.step(self.theta, self.theta_adam)
        self.average()
        self.between()
        self.state.step += 1

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, network: torch.nn.Module, optimizer: torch.optim.Adam) -> None:
        if self.recipe.optimizer.clip_value is not None:
            torch.nn.utils.clip_grad_value_(network.parameters(), self.recipe.optimizer.clip_value)
        optimizer.step()

    def average(self) -> None:
        if self.state.ema is None:
            return
        n = self.state.step
        decay = min(self.recipe.ema, (1 + n) / (10 + n))
        averages = [self.state.ema[name] for name, _ in self.theta.named_parameters()]
        torch._foreach_lerp_(averages, [p.detach() for p in self.theta.parameters()], 1 - decay)

    def between(self) -> None:
        """What upstream does after each of the two steps."""


class UpstreamLoop(PlainLoop):
    """The same steps with the official script's habits. `encode` is called on every forward pass, as its text encoder is."""

    fused = False
    foreach = False

    def __init__(self, setup: Setup, rule: str, encode: Encode = lambda c: c) -> None:
        super().__init__(setup, rule, encode)
        self.losses: list[float] = []

    def __call__(self) -> None:
        with without_tf32():
            super().__call__()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.losses = [*self.losses[-3:], loss.item()]  # waits for the device

    def step(self, network: torch.nn.Module, optimizer: torch.optim.Adam) -> None:
        for p in network.parameters():
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=p.grad)
        super().step(network, optimizer)

    def average(self) -> None:
        if self.state.ema is None:
            return
        n = self.state.step
        decay = min(self.recipe.ema, (1 + n) / (10 + n))
        with torch.no_grad():
            for name, p in self.theta.named_parameters():
                self.state.ema[name].mul_(decay).add_(p.detach(), alpha=1 - decay)

    def between(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        cudnn = torch.backends.cudnn
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


BASELINES: dict[str, type[PlainLoop]] = {"plain": PlainLoop, "upstream": UpstreamLoop}


def step_difference(setup: Setup, loop: PlainLoop) -> dict[str, float]:
    """One iteration of the engine in `setup` against one of `loop`: ‖difference‖ over ‖step‖ of ψ, θ and the average.

    Both must stand at the same weights and draws; eps = 1 in the recipe keeps Adam's update smooth in the gradient.
    """

    def flat(state: object) -> dict[str, Tensor]:
        networks = {"ψ": state.score, "θ": state.generator}
        found = {key: [p.detach() for _, p in network.named_parameters()] for key, network in networks.items()}
        found["average"] = list((state.ema or {}).values())
        return {key: torch.cat([t.reshape(-1) for t in tensors]).clone() for key, tensors in found.items() if tensors}

    before = flat(setup.state)
    setup.iterate()
    loop()
    ours, theirs = flat(setup.state), flat(loop.state)
    return {key: float((ours[key] - theirs[key]).norm() / (theirs[key] - before[key]).norm()) for key in ours}
