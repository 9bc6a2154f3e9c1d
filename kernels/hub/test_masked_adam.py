"""The kernel as it is loaded from the hub: a step moves the weights of the mask, and no others."""

import torch
from pecker_kernels import MaskedAdam, SaliencyMask, SaliencyScores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_step_moves_the_salient_weights_alone():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8)).to(DEVICE)
    scores = SaliencyScores(model.named_parameters())
    model(torch.randn(16, 64, device=DEVICE)).square().sum().backward()
    scores.accumulate()
    mask = SaliencyMask.from_scores(scores, density=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    MaskedAdam(model.named_parameters(), mask=mask, lr=1e-2).step()
    for name, p in model.named_parameters():
        moved = p.detach() != before[name]
        assert torch.equal(moved & ~mask.bool(name), torch.zeros_like(moved))
        assert bool(moved.any()) == bool(mask.bool(name).any())
