"""Under a mask θ's backward pass computes the gradients the rule reads and no others; what it learns is the same."""

import pytest
import torch
from pecker_kernels import SaliencyMask
from torch.utils.flop_counter import FlopCounterMode

from pecker_fast.engine.live import LiveBackward, gradients_of
from pecker_fast.runs.loop import iteration

RULES = ["differentiated", "salient_only", "alternating"]
SMOOTH = {"optimizer": {"eps": 1.0, "clip_value": None}, "lr": 1e-2}  # an update in proportion to its gradient


def weights(denoiser):
    return [p.detach().clone() for _, p in denoiser.named_parameters()]


def trained(setup, rule, structure, skip, steps=3, density=0.2):
    _, engine, state, mask = setup(density, structure=structure, update_rule=rule, mask={"skip": skip}, **SMOOTH)
    start = weights(state.generator)
    for _ in range(steps):
        iteration(engine, state)
    return engine, state, mask, [a - b for a, b in zip(weights(state.generator), start)]


@pytest.mark.some(4)
@pytest.mark.parametrize("structure", ["element", "row", "tile", "tensor"])
@pytest.mark.parametrize("rule", RULES)
def test_the_same_step_is_taken(setup, rule, structure):
    engine, state, mask, got = trained(setup, rule, structure, True)
    assert engine.live.of(state, ["forget"]) is not None, "nothing was skipped"
    _, other, _, want = trained(setup, rule, structure, False)
    for (name, p), a, b in zip(state.generator.named_parameters(), got, want):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-9, name
        if rule == "salient_only":
            assert not a[~mask.bool(name)].any(), name
        assert p.requires_grad
        assert p.grad is None
    for name, average in state.ema.items():
        torch.testing.assert_close(average, other.ema[name], rtol=1e-4, atol=1e-6)


def test_the_gate_sees_gradients_in_the_wrong_order(setup, monkeypatch):
    import pecker_fast.engine.local as local

    def reversed_lanes(*arguments):
        return [g if g is None or g.dim() > 1 else g.flip(0) for g in gradients_of(*arguments)]

    monkeypatch.setattr(local, "gradients_of", reversed_lanes)
    *_, got = trained(setup, "salient_only", "row", True)
    monkeypatch.undo()
    *_, want = trained(setup, "salient_only", "row", False)
    assert any(float((a - b).norm()) > 1e-2 * float(b.norm()) for a, b in zip(got, want))


def backward_flops(engine, state, rule):
    weights_of = dict.fromkeys(("forget",) if rule == "alternating" else ("retain", "forget"), 1.0)
    with state.score.frozen(), FlopCounterMode(display=False) as counter:
        engine.branch_gradients(state, weights_of, state.updates.separate)
    return counter.get_total_flops()


@pytest.mark.some(1)
@pytest.mark.parametrize("rule", RULES)
def test_fewer_flops_are_spent_where_the_mask_limits(setup, rule):
    flops = {}
    for skip in (True, False):
        _, engine, state, _ = setup(0.1, structure="row", update_rule=rule, mask={"skip": skip})
        flops[skip] = backward_flops(engine, state, rule)
    assert flops[True] < flops[False]


def test_a_network_between_steps_is_as_it_was(setup):
    """Copies for export and judging, saliency passes and checkpoints must not see the skipping."""
    engine, state, _, _ = trained(setup, "salient_only", "row", True, steps=1)
    assert all("forward" not in vars(m) for m in state.generator.unet.modules())
    assert all(p.requires_grad for _, p in state.generator.named_parameters())
    copy = state.averaged_generator()
    x = torch.randn(2, *copy.sample_shape)
    copy.eps(x, torch.tensor([3, 4]), torch.tensor([0, 1]))
    iteration(engine, state)


def test_a_new_mask_is_planned_anew_and_an_old_plan_is_kept(setup):
    engine, state, _, _ = trained(setup, "salient_only", "row", True, steps=1)
    first = engine.live.of(state, ["retain", "forget"])
    assert engine.live.of(state, ["retain", "forget"]) is first
    other = SaliencyMask.random(state.generator.named_parameters(), density=0.2, structure="row", seed=9)
    state.updates.set_mask(other)
    before = weights(state.generator)
    iteration(engine, state)
    assert engine.live.of(state, ["retain", "forget"]) is not first
    for (name, p), b in zip(state.generator.named_parameters(), before):
        assert torch.equal(p.detach()[~other.bool(name)], b[~other.bool(name)]), name


def test_dense_branches_and_full_masks_are_left_alone(setup):
    _, engine, state, _ = setup(0.2, structure="row")
    assert engine.live.of(state, ["retain"]) is None
    assert engine.live.of(state, ["forget"]) is not None
    _, engine, state, _ = setup(1.0, update_rule="salient_only")
    assert engine.live.of(state, ["retain", "forget"]) is None
    assert LiveBackward(wanted=False).of(state, ["forget"]) is None


def test_nan_in_a_compact_gradient_is_met(setup):
    from pecker_fast.errors import NonFiniteError

    _, engine, state, _ = setup(0.2, structure="row", update_rule="salient_only")
    before = weights(state.generator)
    with torch.no_grad():
        next(state.score.unet.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="generator"):
        engine.generator_step(state)
    assert all(torch.equal(a, b) for a, b in zip(weights(state.generator), before))
