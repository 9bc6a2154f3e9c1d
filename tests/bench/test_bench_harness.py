"""The benchmarks' own promises: what is wrong is not timed, runs interleave, the tensor lists are the real ones."""

import math
import sys
from pathlib import Path

import pecker_kernels as pk
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "kernels")]

import adam_cases  # noqa: E402
import adam_contenders  # noqa: E402
import flat_cases  # noqa: E402
import harness  # noqa: E402
import saliency_cases  # noqa: E402
import shapes  # noqa: E402


class Recorder:
    """Stands in for the benchmark fixture."""

    def __init__(self):
        self.extra_info, self.rounds = {}, 0

    def pedantic(self, target, setup, rounds, warmup_rounds):
        for _ in range(warmup_rounds + rounds):
            setup()
            target()
        self.rounds = rounds


@pytest.fixture
def small_buffers(monkeypatch):
    monkeypatch.setattr(harness, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(harness, "EVICT_BYTES", 1 << 12)
    monkeypatch.setattr(harness, "matmul_rate", lambda device: 1e9)


def case_of(runs, gate=lambda: None, rounds=3):
    def contender(name):
        return harness.Contender(name, lambda: runs.append(name), lambda: runs.append(f"prepare {name}"))

    return harness.Case(
        contender("ours"), [contender("a"), contender("b")], gate, 1e6, 10.0, iteration_flops=1e9, rounds=rounds
    )


def test_ours_and_peers_take_turns(small_buffers):
    runs, benchmark = [], Recorder()
    harness.compare(benchmark, case_of(runs))
    turn = ["prepare a", "a", "prepare b", "b", "prepare ours", "ours"]
    assert runs == turn * (3 + harness.WARMUP)
    info = benchmark.extra_info
    assert set(info["peers"]) == set(info["ratios"]) == {"a", "b"}
    assert info["ours"]["p20_ms"] <= info["ours"]["p50_ms"] <= info["ours"]["p80_ms"]
    assert info["ratios"]["a"] == info["peers"]["a"]["p50_ms"] / info["ours"]["p50_ms"]
    assert info["share_of_copy_bandwidth"] == pytest.approx(info["bytes_per_s"] / info["copy_bytes_per_s"])
    assert info["share_of_iteration_at_most"] == pytest.approx(1 / (1 + 1e3 / info["ours"]["p50_ms"]))


def test_a_red_gate_is_not_timed(small_buffers):
    def red():
        raise AssertionError("off by one bin")

    runs, benchmark = [], Recorder()
    with pytest.raises(pytest.fail.Exception, match=r"not timed.*off by one bin"):
        harness.compare(benchmark, case_of(runs, red))
    assert not runs
    assert not benchmark.extra_info
    assert not benchmark.rounds


def refused(case):
    with pytest.raises(pytest.fail.Exception, match="not timed"):
        harness.pass_gate(case)


@pytest.mark.parametrize("operation", ["dense", "masked", "differentiated", "extras"])
@pytest.mark.parametrize("fault", ["does nothing", "ignores the mask", "half the step"])
def test_a_broken_step_is_refused(monkeypatch, operation, fault):
    """The gates see ours broken through the public optimizer, whatever kernel serves it."""
    case = adam_cases.AdamCase(operation, "cifar10", density=0.1)
    adam_cases.gate(case, "cpu")
    real = pk.MaskedAdam.step

    def broken(self, masked_grads=None, closure=None):
        if fault == "does nothing":
            return
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        if fault == "ignores the mask" and masked_grads is not None:
            grads = [p.grad.clone() for p in self.param_groups[0]["params"]]
            for p, extra in zip(self.param_groups[0]["params"], masked_grads):
                p.grad.add_(extra)
            real(self, [torch.zeros_like(g) for g in grads])
            return
        real(self, masked_grads)
        with torch.no_grad():
            for p, b in zip(self.param_groups[0]["params"], before):
                if fault == "half the step":
                    p.lerp_(b, 0.5)
                else:
                    p.add_(p.grad.sign(), alpha=-1e-6)

    monkeypatch.setattr(pk.MaskedAdam, "step", broken)
    refused(harness.Case(harness.Contender("ours", print), [], lambda: adam_cases.gate(case, "cpu"), 1.0, 1.0))


def test_broken_thresholds_bits_and_scores_are_refused(monkeypatch):
    kth, pack, named_scores = pk.kth_largest, flat_cases.bitmask.pack_bits, pk.SaliencyScores.named_scores
    threshold = flat_cases.ThresholdCase("half-normal", 0.1)
    bits = flat_cases.BitCase("pack")
    scores = saliency_cases.SaliencyCase("accumulate", "cifar10")
    select = saliency_cases.SaliencyCase("select", "cifar10")
    gates = {
        threshold: flat_cases.gate_threshold, bits: flat_cases.gate_bits,
        scores: saliency_cases.gate, select: saliency_cases.gate,
    }  # fmt: skip
    for case, gate in gates.items():
        gate(case, "cpu")

    def halved(self):
        return ((name, score * 0.5) for name, score in named_scores(self))

    monkeypatch.setattr(pk, "kth_largest", lambda tensors, k: kth(tensors, k + 1))
    monkeypatch.setattr(flat_cases.bitmask, "pack_bits", lambda keep: pack(~keep))
    monkeypatch.setattr(pk.SaliencyScores, "named_scores", halved)
    choose = pk.SaliencyMask.from_scores
    monkeypatch.setattr(pk.SaliencyMask, "from_scores", lambda s, density, **other: choose(s, density / 2, **other))
    for case, gate in gates.items():
        made = harness.Contender("ours", print)
        refused(harness.Case(made, [], lambda case=case, gate=gate: gate(case, "cpu"), 1.0, 1.0))


def test_the_tensor_lists():
    assert len(shapes.sd15()) == shapes.SD15_TENSORS == 686
    assert shapes.size(shapes.sd15()) == shapes.SD15_WEIGHTS == 859_520_964
    sample = shapes.sd15_sixteenth()
    assert len(sample) == 43
    assert shapes.size(sample) == pytest.approx(shapes.SD15_WEIGHTS / 16, rel=0.01)
    assert set(sample) <= set(shapes.sd15())
    assert (len(shapes.cifar10()), shapes.size(shapes.cifar10())) == (329, 35_751_939)
    assert shapes.size(shapes.flat()) == 1 << 25


def test_flops_of_a_forward_pass():
    from diffusers import UNet2DConditionModel, UNet2DModel
    from torch.utils.flop_counter import FlopCounterMode

    from pecker_fast.pretrain.settings import settings_for, unet_config

    with torch.device("meta"):
        sd15 = UNet2DConditionModel(**shapes.SD15_CONFIG)
        cifar10 = UNet2DModel(**unet_config(settings_for("cifar10"), 3, 32, 10))
        t = torch.tensor(1)
        with FlopCounterMode(display=False) as large:
            sd15(torch.empty(1, 4, 64, 64), t, torch.empty(1, 77, 768))
        with FlopCounterMode(display=False) as small:
            cifar10(torch.empty(1, 3, 32, 32), t, class_labels=torch.zeros(1, dtype=torch.long))
    counted = {"sd15": large.get_total_flops(), "cifar10": small.get_total_flops()}
    assert counted == shapes.FORWARD_FLOPS


def test_bytes_of_a_step():
    """The floors of docs/performance.md."""
    shape = (("w", (512, 1024)),)
    n = math.prod(shape[0][1])
    cost = {}
    for density in (1.0, 0.5, 0.1):
        case = adam_cases.AdamCase("masked", "flat", density=density)
        mask = case.mask(shape, "cpu")
        cost[density] = adam_cases.step_cost(case, mask, n, 32)[0] / n
    assert cost[1.0] == 28 + 1 / 8
    assert cost[0.5] == pytest.approx(20.1, abs=0.1)
    assert cost[0.1] == pytest.approx(8.6, abs=0.1)
    dense = adam_cases.AdamCase("dense_beta1_0", "flat")
    assert adam_cases.step_cost(dense, None, n, 32)[0] == 20 * n
    assert harness.live_lines([torch.tensor([1] + [0] * 16 + [1, 0]).bool()], 64) == 2
    assert adam_contenders.implementation("cpu") in ("cpu", "auto")
