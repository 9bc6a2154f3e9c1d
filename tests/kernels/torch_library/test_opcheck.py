"""torch.library.opcheck with all its checks, for every operation of torch_library. None fails.

What the checks cannot say: packing, unpacking and counting take bool and uint8 alone, which no gradient flows through, so
test_autograd_registration has nothing to look at there and reports success; for the operations on floating tensors it
is run on tensors that require a gradient. The fused norm alone has a backward; the others are meant for no_grad code.
"""

import pytest
import torch
from pecker_kernels import reference
from pecker_kernels.torch_library import adam as ops
from pecker_kernels.torch_library import norm as ops_norm
from pecker_kernels.torch_library import scores as ops_select
from pecker_kernels.torch_library import wgrad as ops_wgrad

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SIZES = (0, 1, 7, 8, 65, 1030)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
IMPLS = ("auto", "reference")


def keep_of(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.4


def passes(op, args, kwargs=None):
    results = torch.library.opcheck(op, args, kwargs or {}, test_utils=CHECKS)
    assert results == dict.fromkeys(CHECKS, "SUCCESS")


def test_every_operation_is_checked_here():
    here = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("pecker::")}
    assert here == {
        "pack_bits", "unpack_bits", "popcount", "apply_", "masked_adam_",
        "accumulate_", "contrast_", "kth_largest", "keep_top_k", "clip_norm_factor",
        "tile_weight_grad", "group_norm_silu", "group_norm_silu_backward",
    }  # fmt: skip


@pytest.mark.some(4)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("impl", IMPLS)
def test_bits(n, impl):
    keep = keep_of(n)
    bits = reference.pack_bits(keep)
    for source in (keep, keep.to(torch.uint8), keep.view(1, n)):
        passes(ops.pack_bits, (source,), {"impl": impl})
    passes(ops.unpack_bits, (bits, n), {"impl": impl})
    passes(ops.popcount, (bits,), {"impl": impl})


@pytest.mark.some(4)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_apply(n, dtype, impl):
    passes(ops.apply_, (torch.randn(n).to(dtype), reference.pack_bits(keep_of(n))), {"impl": impl})


@pytest.mark.parametrize("leaf", [True, False])
def test_apply_to_what_requires_a_gradient(leaf):
    x = torch.randn(24, requires_grad=True)
    passes(ops.apply_, (x if leaf else x.clone(), reference.pack_bits(keep_of(24))))


def test_apply_any_strides():
    passes(ops.apply_, (torch.randn(6, 4).t(), reference.pack_bits(keep_of(24))))


def adam_arguments(shapes, dtype, masked, beta1, whole=False):
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    keeps = [keep_of(torch.Size(shape).numel(), i) for i, shape in enumerate(shapes)]
    bits = [reference.pack_bits(keep) for keep in keeps] if masked else []
    moments = [(int(keep.sum()),) if masked and not whole else shape for keep, shape in zip(keeps, shapes)]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    params, grads = [normal(*s) for s in shapes], [normal(*s) for s in shapes]
    first = [normal(*s).to(work) for s in moments] if beta1 else []
    return params, grads, bits, first, [normal(*s).to(work).square() for s in moments], 3


@pytest.mark.some(6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize(
    "settings",
    [
        {"beta1": 0.0},
        {"beta1": 0.9, "weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "clip_value": 0.5, "clip_norm": 1.0},
        {"impl": "reference"},
    ],
    ids=str,
)
def test_masked_adam(dtype, masked, settings):
    arguments = adam_arguments([(65,), (3, 7), (1,)], dtype, masked, settings.get("beta1", 0.9))
    passes(ops.masked_adam_, arguments, settings)


def adam_form(form, dtype, masked=True):
    """(arguments, keyword arguments) of masked_adam_ with all that the words in `form` ask for."""
    whole = "differentiated" in form
    arguments = adam_arguments([(65,), (3, 7), (1,), (0,)], dtype, masked, 0.0 if "beta1=0" in form else 0.9, whole)
    params, _, _, _, exp_avg_sqs, _ = arguments
    more = {"beta1": 0.0} if "beta1=0" in form else {}
    if whole:
        more["masked_grads"] = [torch.randn_like(p) for p in params]
    if "ema" in form:
        more |= {"emas": [torch.rand_like(v) for v in exp_avg_sqs], "ema": 0.99}
    if "masters" in form:
        more["masters"] = [torch.rand_like(v) for v in exp_avg_sqs]
    if "clipped" in form:
        more |= {"clip_value": 0.5, "clip_norm": 1.0}
    return arguments, more


@pytest.mark.some(6)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("differentiated", torch.float32),
        ("differentiated ema clipped", torch.float64),
        ("differentiated beta1=0 masters ema", torch.float16),
        ("ema", torch.float32),
        ("beta1=0 ema clipped", torch.bfloat16),
        ("masters", torch.bfloat16),
    ],
    ids=str,
)
def test_forms_of_masked_adam(form, dtype, masked, impl):
    arguments, more = adam_form(form, dtype, masked)
    passes(ops.masked_adam_, arguments, {**more, "impl": impl, "seed": 5})


def test_masked_adam_with_empty_lists():
    arguments, _ = adam_form("", torch.float32)
    passes(ops.masked_adam_, arguments, {"masked_grads": [], "emas": [], "masters": []})


@pytest.mark.parametrize("which", [0, 1], ids=["params", "grads"])
def test_masked_adam_of_what_requires_a_gradient(which):
    arguments = adam_arguments([(65,), (3, 7)], torch.float32, True, 0.9)
    for tensor in arguments[which]:
        tensor.requires_grad_()
    passes(ops.masked_adam_, arguments)


def test_masked_adam_of_nothing():
    passes(ops.masked_adam_, ([], [], [], [], [], 1))


def values(dtype=torch.float32, shapes=((65,), (3, 7), (), (0,)), seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.some(4)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "abs", "square"])
@pytest.mark.parametrize("impl", IMPLS)
def test_accumulate(dtype, reduction, impl):
    passes(ops_select.accumulate_, (values(), values(dtype, seed=4), reduction), {"impl": impl})


def test_accumulate_of_what_requires_a_gradient_and_of_nothing():
    passes(ops_select.accumulate_, (values(), [g.requires_grad_() for g in values()], "sum"))
    passes(ops_select.accumulate_, ([], [], "sum"))


@pytest.mark.parametrize("reduction", ["sum", "square"])
@pytest.mark.parametrize("impl", IMPLS)
def test_contrast(reduction, impl):
    squares = [v.square() for v in values(seed=4)]
    passes(ops_select.contrast_, (values(), squares, 3, reduction), {"floor": 0.01, "impl": impl})


@pytest.mark.some(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", [ops_select.kth_largest, ops_select.keep_top_k], ids=["kth_largest", "keep_top_k"])
def test_selection(op, dtype, impl):
    scores = [v.abs() for v in values(dtype)]
    passes(op, (scores, 17), {"impl": impl})
    passes(op, (scores[:1], 65), {"impl": impl})
    passes(op, ([s.requires_grad_() for s in scores], 1), {"impl": impl})


@pytest.mark.some(4)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("impl", IMPLS)
def test_clip_norm_factor(dtype, masked, impl):
    grads = values(dtype)
    bits = [reference.pack_bits(keep_of(g.numel())) for g in grads] if masked else []
    passes(ops_select.clip_norm_factor, (grads, bits, 1.0), {"clip_value": 0.5, "impl": impl})
    passes(ops_select.clip_norm_factor, ([g.requires_grad_() for g in grads], bits, 1.0), {"impl": impl})


def test_clip_norm_factor_of_nothing():
    passes(ops_select.clip_norm_factor, ([], [], 1.0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_tile_weight_grad(dtype, impl):
    g, x = values(dtype, ((9, 20), (9, 40)))
    tiles = torch.tensor([[0, 16, 0, 24], [0, 32, 16, 24], [16, 0, 384, 16]])
    passes(ops_wgrad.tile_weight_grad, (g, x, tiles, 448, 16, 16), {"impl": impl})
    passes(ops_wgrad.tile_weight_grad, (g, x, tiles[:0], 0, 16, 16), {"impl": impl})


@pytest.mark.some(2)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_group_norm_silu(dtype, impl):
    x, weight, bias = torch.randn(2, 6, 3, 5).to(dtype), torch.randn(6).to(dtype), torch.randn(6).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    passes(ops_norm.group_norm_silu, (*leaves, 3, 1e-5, True, impl))
    passes(
        ops_norm.group_norm_silu, (x.contiguous(memory_format=torch.channels_last), weight, bias, 2, 1e-5, False, impl)
    )
    _, mean, rstd = ops_norm.group_norm_silu(x, weight, bias, 3, 1e-5, True, impl)
    passes(ops_norm.group_norm_silu_backward, (torch.randn_like(x), x, weight, bias, mean, rstd, 3, True, impl))


def test_opcheck_sees_a_wrong_schema_and_a_wrong_shape():
    """The checks above mean something: an operation that hides a write, and one that lies about its result, fail."""
    library = torch.library.Library("pecker_test", "FRAGMENT")
    try:
        library.define("hidden_write(Tensor x) -> Tensor")
        library.impl("hidden_write", lambda x: x.mul_(0).clone(), "CPU")
        library.impl("hidden_write", torch.empty_like, "Meta")
        with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
            torch.library.opcheck(torch.ops.pecker_test.hidden_write.default, (torch.ones(3),), test_utils=CHECKS)
        library.define("wrong_shape(Tensor x) -> Tensor")
        library.impl("wrong_shape", lambda x: x.clone(), "CPU")
        library.impl("wrong_shape", lambda x: x.new_empty(x.numel() + 1), "Meta")
        with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
            torch.library.opcheck(torch.ops.pecker_test.wrong_shape.default, (torch.ones(3),), test_utils=CHECKS)
    finally:
        library._destroy()
