"""The operations of torch.ops.pecker by Triton: what impl="reference" gives."""

import pytest
import torch
from pecker_kernels import reference

OPS = torch.ops.pecker
SHAPES = ((65,), (33, 70), (0,), (9, 3, 5))


def normal(seed, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]


def bits_of(device):
    return [
        reference.pack_bits(torch.rand(s, generator=torch.Generator().manual_seed(0)) < 0.4).to(device) for s in SHAPES
    ]


def test_scores_and_selection(device):
    found, truth = normal(0, device), normal(0, device)
    squares = [s.square() for s in normal(2, device)]
    for impl, scores in (("triton", found), ("reference", truth)):
        OPS.accumulate_(scores, normal(1, device, torch.bfloat16), "sum", impl)
        OPS.contrast_(scores, squares, 3, "sum", impl=impl)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=0)
    assert float(OPS.kth_largest(truth, 300, "triton")) == reference.kth_largest(truth, 300)
    kept = OPS.keep_top_k(truth, 300, "triton")
    assert all(torch.equal(a, b) for a, b in zip(kept, OPS.keep_top_k(truth, 300, "reference")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
def test_clip_norm_factor(device, dtype, masked):
    bits, grads = bits_of(device) if masked else [], normal(1, device, dtype)
    found, truth = (OPS.clip_norm_factor(grads, bits, 3.0, 0.5, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=0)


def test_differentiated_step_with_average(device):
    results = []
    for impl in ("triton", "reference"):
        params, grads, extra = (normal(i, device) for i in range(3))
        state = [[torch.zeros_like(p) for p in params] for _ in range(3)]
        OPS.masked_adam_(
            params, grads, bits_of(device), state[0], state[1], 1, clip_norm=1.0, impl=impl, masked_grads=extra,
            emas=state[2], ema=0.9,
        )  # fmt: skip
        results.append([params, *state])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
