import pecker_kernels as pk
import pytest
import torch
from kernel_gates import fill_grads, small_model
from pecker_kernels import native as cpu
from pecker_kernels import reference
from pecker_kernels.scores import backend as select_backend

IMPLS = ["reference"] + ["cpu"] * cpu.available()


def accumulated(reduction, rounds=3, dtype=torch.float32, impl="auto"):
    model = small_model(dtype=dtype)
    scores = pk.SaliencyScores(model.named_parameters(), reduction, impl)
    truth = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for i in range(rounds):
        for name, g in fill_grads(model, seed=i).items():
            reference.accumulate_(truth[name], g, reduction)
        before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        scores.accumulate(last=i == rounds - 1)
        for name, p in model.named_parameters():
            assert (p.grad is None) if before[name] is None else torch.equal(p.grad, before[name])
    if reduction == "sum":
        truth = {name: t.abs() for name, t in truth.items()}
    return scores, truth


@pytest.mark.parametrize("reduction", ["sum", "abs", "square"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_accumulate(reduction, dtype, impl):
    scores, truth = accumulated(reduction, dtype=dtype, impl=impl)
    found = dict(scores.named_scores())
    assert list(found) == list(truth)
    for name, score in found.items():
        assert score.dtype == torch.float32
        torch.testing.assert_close(score, truth[name], rtol=1e-6, atol=0)
        assert bool((score >= 0).all())
    assert not found["unused"].any()
    assert scores.accumulations == 3


@pytest.mark.parametrize("impl", IMPLS)
def test_gate_fails_when_a_gradient_is_not_added(monkeypatch, impl):
    ops = select_backend.backend(impl)
    real = ops.accumulate_
    monkeypatch.setattr(ops, "accumulate_", lambda scores, grads, *rest: real(scores, [None] * len(grads), *rest))
    scores, truth = accumulated("sum", impl=impl)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(dict(scores.named_scores())["scale"], truth["scale"])


def test_only_parameters_with_gradients_are_scored():
    model = small_model()
    model[0].weight.requires_grad_(False)
    scores = pk.SaliencyScores(model.named_parameters())
    assert "0.weight" not in scores.names
    assert scores.total == sum(p.numel() for p in model.parameters()) - model[0].weight.numel()
    with pytest.raises(pk.PeckerKernelsError, match="no parameter requires"):
        pk.SaliencyScores([("a", torch.ones(3))])


@pytest.mark.parametrize("impl", IMPLS)
def test_contrast(impl):
    ours, truth = accumulated("sum", impl=impl)
    other, squares = accumulated("square")
    ours.contrast_(other, floor=0.01)
    rms = {name: (s.double() / 3).sqrt() for name, s in squares.items()}
    mean = float(sum(r.sum() for r in rms.values())) / ours.total
    for name, score in ours.named_scores():
        expected = truth[name].double() / (rms[name] + 0.01 * mean)
        torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=0)
    with pytest.raises(pk.PeckerKernelsError, match="already contrasted"):
        ours.accumulate()
    with pytest.raises(pk.PeckerKernelsError, match="already contrasted"):
        ours.contrast_(other)


def test_contrast_refusals():
    ours, _ = accumulated("sum")
    with pytest.raises(pk.PeckerKernelsError, match="square"):
        ours.contrast_(accumulated("abs")[0])
    square, _ = accumulated("square")
    for floor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(pk.PeckerKernelsError, match="floor"):
            ours.contrast_(square, floor=floor)
    other = torch.nn.Linear(2, 2)
    other.weight.grad = torch.ones(2, 2)
    foreign = pk.SaliencyScores(other.named_parameters(), "square")
    with pytest.raises(pk.ScoreError, match="no gradient was accumulated"):
        ours.contrast_(foreign)
    foreign.accumulate()
    with pytest.raises(pk.PeckerKernelsError, match="same parameters"):
        ours.contrast_(foreign)
    silent = pk.SaliencyScores(small_model().named_parameters(), "square")
    silent.accumulate()
    with pytest.raises(pk.ScoreError, match="every retain gradient is zero"):
        ours.contrast_(silent)


def test_gradients_that_are_not_finite_are_named_when_the_mask_is_built():
    model = small_model()
    for structure in ("element", "row", "tile", "tensor"):
        for scope in ("global", "tensor"):
            scores = pk.SaliencyScores(model.named_parameters())
            fill_grads(model, seed=0)
            model[2].bias.grad[3] = float("nan")
            scores.accumulate()
            with pytest.raises(pk.ScoreError, match=r"2\.bias"):
                pk.SaliencyMask.from_scores(scores, density=0.5, structure=structure, scope=scope)
    with pytest.raises(pk.ScoreError, match=r"2\.bias"):
        pk.SaliencyMask.from_scores(scores, threshold=0.1)


def test_misuse():
    with pytest.raises(pk.PeckerKernelsError, match="unknown reduction"):
        pk.SaliencyScores(small_model().named_parameters(), "mean")
    scores = pk.SaliencyScores(small_model().named_parameters())
    with pytest.raises(pk.ScoreError, match="no gradient was accumulated"):
        pk.SaliencyMask.from_scores(scores, density=0.5)
