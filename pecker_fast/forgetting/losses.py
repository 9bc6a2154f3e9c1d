"""The losses of Score Forgetting Distillation and the saliency loss, each per sample: the caller weighs and averages.

Letters as in the paper: φ teacher, ψ score, θ generator, f(x_t, c) the conditional mean of x_0, C elements of one sample.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pecker_fast.networks import Denoiser, pair_x0

Prediction = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t [N,C,H,W], t [N], c [N]) -> [N,C,H,W]


def generate(generator: Denoiser, z: Tensor, c: Tensor, t_init: int | Tensor) -> Tensor:
    """One-step generator: x_g = x_init/a − σ ε_θ(x_init, t_init, c) with x_init = b_init z: f_θ(x_init, c). [N, C, H, W]

    t_init: of all samples, or [N].
    """
    t = t_init if isinstance(t_init, Tensor) else torch.full((z.shape[0],), t_init, device=z.device)
    _, b = generator.schedule.coefficients(t)
    return generator.x0(b * z, t, c)


def noise_loss(eps: Prediction, x_t: Tensor, e: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """Σ_pix (e − ε(x_t, t, c))², [N]: L_ψ of SFD on samples of θ, and the saliency loss of PECKER (Eq. 8) on the forget set."""
    return (e - eps(x_t, t, c)).square().flatten(1).sum(1)


def distillation_loss(
    x_g: Tensor,  # [N, C, H, W], the sample the gradient is for
    f_teacher: Tensor,  # [N, C, H, W], f_φ(x_t, c_p)
    f_score: Tensor,  # [N, C, H, W], f_ψ(x_t, c_g)
    alpha: float,
) -> Tensor:
    """Σ_pix (f_φ − f_ψ) · [(f_φ − x_g) − α (f_φ − f_ψ)] / ω with ω = max(mean_pix |f_φ − x_g|, 1e-5), [N].

    L_sd with c_p = c_g = c_r, L_sfd with c_g = c_f and c_p = c_o. Only ω is detached: the gradient flows through x_g, and
    through x_t into both f_φ and f_ψ, whose parameters alone are frozen.
    """
    omega = (f_teacher - x_g).detach().abs().flatten(1).mean(1).clamp_min(1e-5)  # [N]
    difference = f_teacher - f_score
    return (difference * ((f_teacher - x_g) - alpha * difference)).flatten(1).sum(1) / omega


def generator_loss(
    teacher: Denoiser,
    score: Denoiser,
    x_g: Tensor,  # [N, C, H, W], one-step samples
    e: Tensor,  # [N, C, H, W], fresh noise
    t: Tensor,  # [N]
    c_s: Tensor,  # [N], condition of the score network
    c_p: Tensor,  # [N], condition of the teacher
    *,
    alpha: float,
    guidance_teacher: float = 1.0,
    guidance_score: float = 1.0,
    detach_score: bool = False,
) -> Tensor:
    """`distillation_loss` at x_t = a_t x_g + b_t e, [N]. detach_score drops the gradient through φ and ψ (Diff-Instruct)."""
    x_t = teacher.schedule.add_noise(x_g, e, t)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_score):
        f_teacher, f_score = pair_x0(teacher, score, x_t, t, c_p, c_s, guidance_teacher, guidance_score)
    return distillation_loss(x_g, f_teacher, f_score, alpha)


def share_left(
    x_g: Tensor,  # [N, C, H, W], what f_φ and f_ψ were made of; requires a gradient
    f_teacher: Tensor,  # [N, C, H, W], f_φ(x_t, c_p)
    f_score: Tensor,  # [N, C, H, W], f_ψ(x_t, c_g)
    alpha: float,
) -> float:
    """‖∂L/∂x_g‖ over its norm with f_ψ held fixed: what is left where the terms of φ and ψ cancel. With c_p = c_g and ψ = φ
    they are the same number with opposite signs: 0, or rounding."""
    if not f_score.requires_grad:  # detach_score: L moves with −x_g alone, by the difference
        left, whole = f_teacher - f_score, f_teacher - x_g
    else:
        (left,) = torch.autograd.grad(distillation_loss(x_g, f_teacher, f_score, alpha).sum(), x_g, retain_graph=True)
        fixed = distillation_loss(x_g, f_teacher, f_score.detach(), alpha)
        (whole,) = torch.autograd.grad(fixed.sum(), x_g)
    return float(left.detach().norm() / whole.detach().norm().clamp_min(torch.finfo(torch.float32).tiny))
