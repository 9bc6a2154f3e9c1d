"""The losses and their gradients against a float64 implementation written here from the formulas of docs/method."""

import math

import pytest
import torch
from tiny_models import write_tiny_model

from pecker_fast.forgetting import losses
from pecker_fast.networks.denoiser import Denoiser, load_denoiser
from pecker_fast.networks.schedule import Schedule

N, T_INIT, ALPHA = 3, 440, 1.2


@pytest.fixture(params=["epsilon", "v_prediction", "sample"])
def nets(request, tmp_path):
    """φ, ψ, θ in float64, three different random networks of one prediction type."""
    out = []
    for seed in range(3):
        d = load_denoiser(write_tiny_model(tmp_path / str(seed), request.param, seed, judge=False))
        s = d.schedule
        # the truth below recomputes ᾱ itself, so that a wrong schedule shows as well
        s = Schedule(s.a.double(), s.b.double(), s.prediction_type, s.config)
        out.append(Denoiser(d.unet.double(), s, d.null_class))
    teacher, score, generator = out
    teacher.freeze()
    return request.param, teacher, score, generator


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(5)
    z = torch.randn(N, 1, 8, 8, generator=g, dtype=torch.float64)
    e = torch.randn(N, 1, 8, 8, generator=g, dtype=torch.float64)
    t = torch.tensor([38, 300, 711])
    return z, e, t, torch.tensor([0, 0, 2]), torch.tensor([1, 1, 2])


def alpha_bar(t):
    product = 1.0
    for i in range(int(t) + 1):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
    return product


def truth_x0(kind, unet, x, t, c):
    """f(x_t, c) one sample at a time, from the definition of each prediction type."""
    rows = []
    for i in range(x.shape[0]):
        ab = alpha_bar(t[i])
        a, b = math.sqrt(ab), math.sqrt(1 - ab)
        out = unet(x[i : i + 1], t[i : i + 1], class_labels=c[i : i + 1]).sample
        rows.append(
            {"epsilon": (x[i : i + 1] - b * out) / a, "v_prediction": a * x[i : i + 1] - b * out, "sample": out}[kind]
        )
    return torch.cat(rows)


def truth_noise(x_0, e, t):
    return torch.cat(
        [math.sqrt(alpha_bar(k)) * x + math.sqrt(1 - alpha_bar(k)) * n for x, n, k in zip(x_0.split(1), e.split(1), t)]
    )


def truth_generate(kind, unet, z, c):
    """x_g = x_init/a_init − σ_init ε with x_init = b_init z."""
    t = torch.full((z.shape[0],), T_INIT)
    ab = alpha_bar(T_INIT)
    a, b = math.sqrt(ab), math.sqrt(1 - ab)
    x_init = b * z
    x_0 = truth_x0(kind, unet, x_init, t, c)
    eps = (x_init - a * x_0) / b
    return x_init / a - (b / a) * eps


def truth_generator_loss(kind, teacher, score, generator, batch, omega_detached=True, through_nets=True):
    z, e, t, c_g, c_p = batch
    x_g = truth_generate(kind, generator.unet, z, c_g)
    x_t = truth_noise(x_g, e, t)
    if not through_nets:
        x_t = x_t.detach()
    f_phi = truth_x0(kind, teacher.unet, x_t, t, c_p)
    f_psi = truth_x0(kind, score.unet, x_t, t, c_g)
    total = 0.0
    for i in range(N):
        gap = (f_phi[i] - x_g[i]).abs().mean().clamp_min(1e-5)
        omega = gap.detach() if omega_detached else gap
        total = total + ((f_phi[i] - f_psi[i]) * ((f_phi[i] - x_g[i]) - ALPHA * (f_phi[i] - f_psi[i]))).sum() / omega
    return total / N


def gradient(loss, module):
    grads = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(module.parameters(), grads)])


def ours(teacher, score, generator, batch, **options):
    z, e, t, c_g, c_p = batch
    x_g = losses.generate(generator, z, c_g, T_INIT)
    return losses.generator_loss(teacher, score, x_g, e, t, c_g, c_p, alpha=ALPHA, **options).mean()


def close(a, b, tolerance=1e-6):
    # diffusers computes its timestep embedding in float32, the schedule's ᾱ is float32-rounded: both bound the agreement
    return float((a - b).detach().norm() / b.detach().norm()) <= tolerance


def test_one_step_generator(nets, batch):
    kind, _, _, generator = nets
    assert close(
        losses.generate(generator, batch[0], batch[3], T_INIT), truth_generate(kind, generator.unet, batch[0], batch[3])
    )


def test_score_loss_and_gradient(nets, batch):
    kind, _, score, generator = nets
    z, e, t, c, _ = batch
    with torch.no_grad():
        x_g = truth_generate(kind, generator.unet, z, c)
    x_t = truth_noise(x_g, e, t)
    f = truth_x0(kind, score.unet, x_t, t, c)
    total = 0.0
    for i in range(N):
        ab = alpha_bar(t[i])
        eps = (x_t[i] - math.sqrt(ab) * f[i]) / math.sqrt(1 - ab)
        total = total + (e[i] - eps).square().sum()
    want = total / N
    got = losses.noise_loss(score.eps, score.schedule.add_noise(x_g, e, t), e, t, c).mean()
    assert close(got.detach(), want.detach())
    assert close(gradient(got, score.unet), gradient(want, score.unet))


def test_score_loss_is_the_snr_weighted_x0_error(nets, batch):
    kind, _, score, _ = nets
    z, e, t, c, _ = batch
    x_t = truth_noise(z, e, t)
    f = truth_x0(kind, score.unet, x_t, t, c)
    snr = torch.tensor([alpha_bar(k) / (1 - alpha_bar(k)) for k in t], dtype=torch.float64)
    want = snr * (z - f).square().flatten(1).sum(1)
    assert close(losses.noise_loss(score.eps, x_t, e, t, c), want)


def test_generator_loss_and_gradient_to_theta(nets, batch):
    _kind, teacher, score, generator = nets
    got, want = ours(teacher, score, generator, batch), truth_generator_loss(*nets, batch)
    assert close(got.detach(), want.detach())
    assert close(gradient(got, generator.unet), gradient(want, generator.unet))


def test_gradient_reaches_theta_through_both_frozen_nets(nets, batch):
    """The gate above must fail for a gradient through x_g alone, and for one through ω."""
    _kind, teacher, score, generator = nets
    want = gradient(truth_generator_loss(*nets, batch), generator.unet)
    direct_only = gradient(ours(teacher, score, generator, batch, detach_score=True), generator.unet)
    through_omega = gradient(truth_generator_loss(*nets, batch, omega_detached=False), generator.unet)
    assert not close(direct_only, want, 1e-2)
    assert not close(through_omega, want, 1e-2)


def test_detach_score_is_diff_instruct(nets, batch):
    kind, teacher, score, generator = nets
    z, e, t, c_g, c_p = batch
    x_g = truth_generate(kind, generator.unet, z, c_g)
    with torch.no_grad():
        x_t = truth_noise(x_g, e, t)
        f_phi, f_psi = truth_x0(kind, teacher.unet, x_t, t, c_p), truth_x0(kind, score.unet, x_t, t, c_g)
        omega = (f_phi - x_g).abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    want = gradient((-(f_phi - f_psi) / omega * x_g).sum() / N, generator.unet)
    assert close(gradient(ours(teacher, score, generator, batch, detach_score=True), generator.unet), want)


def test_swapped_cover_class_is_seen(nets, batch):
    _kind, teacher, score, generator = nets
    z, e, t, c_g, _c_p = batch
    swapped = (z, e, t, c_g, c_g)
    assert not close(
        ours(teacher, score, generator, swapped).detach(), ours(teacher, score, generator, batch).detach(), 1e-3
    )


def test_identity_of_the_loss(nets, batch):
    """L = (1−α) ω⁻¹‖f_φ−f_ψ‖² + ω⁻¹ (f_φ−f_ψ)·(f_ψ−x_g)."""
    g = torch.Generator().manual_seed(1)
    x, p, q = (torch.randn(4, 1, 8, 8, generator=g, dtype=torch.float64) for _ in range(3))
    omega = (p - x).abs().flatten(1).mean(1)
    d = (p - q).flatten(1)
    want = ((1 - ALPHA) * d.square().sum(1) + (d * (q - x).flatten(1)).sum(1)) / omega
    assert torch.allclose(losses.distillation_loss(x, p, q, ALPHA), want, rtol=1e-12)


def test_omega_has_a_floor():
    x = torch.zeros(1, 1, 2, 2)
    assert torch.isfinite(losses.distillation_loss(x, x, x + 1, 1.0)).all()
