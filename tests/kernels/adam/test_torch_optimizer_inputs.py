"""MaskedAdam without a mask over PyTorch's own inputs for its Adam and AdamW: the settings both have, and their errors."""

import re
import warnings

import pecker_kernels as pk
import pytest
import torch
from kernel_gates import check_accuracy
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

INFOS = {info.optim_cls: info for info in optim_db if info.optim_cls in (torch.optim.Adam, torch.optim.AdamW)}
OURS = {"lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "capturable"}
# Lists for a GPU hold the capturable and Tensor-lr settings too; the settings themselves need none.
DEVICES = ("cpu", "cuda")
LAYOUTS = ("plain", "groups", "named")


def has_no_counterpart(kwargs):
    """What MaskedAdam lacks of these settings, or None."""
    if any(isinstance(beta, torch.Tensor) for beta in kwargs.get("betas", ())):
        return "Tensor betas"
    return next((key for key, value in kwargs.items() if key not in OURS and value), None)


def settings(kind):
    """({description: keyword arguments} to compare, {description: what we lack} of PyTorch's inputs)."""
    inputs = {i.desc: i.kwargs for device in DEVICES for i in INFOS[kind].optim_inputs_func(device=device)}
    skipped = {desc: lack for desc, kwargs in inputs.items() if (lack := has_no_counterpart(kwargs)) is not None}
    taken = {desc: kwargs for desc, kwargs in inputs.items() if desc not in skipped}
    # The rest of an input with, say, amsgrad is ours again.
    for desc, lack in skipped.items():
        if lack != "Tensor betas":
            taken[f"{desc}, without {lack}"] = {key: value for key, value in inputs[desc].items() if key in OURS}
    taken["betas, eps, decay, Tensor lr"] = {
        "lr": torch.tensor(0.01), "betas": (0.5, 0.95), "eps": 1e-5, "weight_decay": 0.1,
    }  # fmt: skip
    return taken, skipped


CASES = [(kind, desc) for kind in INFOS for desc in settings(kind)[0]]


def test_nothing_is_skipped_in_silence():
    """Counts written down: a torch whose lists change has to be looked at."""
    assert set(INFOS) == {torch.optim.Adam, torch.optim.AdamW}
    for kind in INFOS:
        taken, skipped = settings(kind)
        assert (len(taken), len(skipped)) == (9, 6), f"{kind.__name__}: {sorted(taken)}, {skipped}"
        assert sorted(skipped.values()) == ["Tensor betas", "Tensor betas", "amsgrad", "amsgrad", "amsgrad", "maximize"]


def layout_of(params, layout):
    if layout == "groups":
        return [{"params": params[:1], "weight_decay": 0.01}, {"params": params[1:], "lr": 0.005}]
    return [(f"p{i}", p) for i, p in enumerate(params)] if layout == "named" else params


def trajectory(make, layout, dtype, steps=6):
    """Updates of every step, from zero, where they are exact, or from tiny weights."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in ((7, 5), (11,), (), (3, 2, 4))]
    starts = [2.0**-12 * (i + 1) for i in range(len(params))]
    optimizer = make(layout_of(params, layout))
    for step in range(steps):
        for i, p in enumerate(params):
            # Decay needs weights; as small as the update, so that rounding them does not hide it.
            p.data.fill_(starts[i] if step % 2 else 0.0)
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).float().to(dtype)
        if step == 3:
            params[1].grad = None
        optimizer.step()
        yield [p.detach() - (start if step % 2 else 0.0) for p, start in zip(params, starts)]


def kind_for(kind, kwargs):
    """AdamW is Adam with decoupled decay, of .01 where none is named."""
    if kind is torch.optim.AdamW:
        return {"weight_decay": 0.01, **kwargs, "decoupled_weight_decay": True}
    return kwargs


def check(kind, kwargs, layout, dtype=torch.float32, ours=pk.MaskedAdam, **peer):
    peer_kwargs = {**kwargs, **peer}
    runs = (
        trajectory(lambda params: ours(params, **kind_for(kind, kwargs)), layout, dtype),
        trajectory(lambda params: kind(params, **peer_kwargs), layout, dtype),
        trajectory(
            lambda params: kind(params, **{k: v for k, v in kwargs.items() if k != "capturable"}), layout, torch.float64
        ),
    )
    for found, same, truth in zip(*runs):
        for a, b, c in zip(found, same, truth):
            check_accuracy(a, b, c)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kind", "desc"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_the_dense_path_is_torchs(kind, desc, layout):
    kwargs = settings(kind)[0][desc]
    # torch refuses to run capturable on a CPU; its arithmetic is the fused one's.
    peer = {"capturable": False} if kwargs.get("capturable") else {}
    check(kind, kwargs, layout, fused=True, **peer)


def test_the_gate_fails_on_a_setting_that_is_dropped():
    kinds = {"lr": ("non-default lr",), "weight_decay": ("nonzero weight_decay",)}
    for key, descriptions in kinds.items():
        for desc in descriptions:
            kwargs = settings(torch.optim.Adam)[0][desc]

            def dropped(params, key=key, **settings):
                return pk.MaskedAdam(params, **{k: v for k, v in settings.items() if k != key})

            with pytest.raises(AssertionError):
                check(torch.optim.Adam, kwargs, "plain", ours=dropped, fused=True)


def errors(kind):
    """PyTorch's error inputs: those about settings that MaskedAdam has, and the rest by description."""
    mine, other = [], []
    for entry in INFOS[kind].optim_error_inputs_func(device="cpu", dtype=torch.float32):
        kwargs = entry.optimizer_error_input.kwargs
        (other if has_no_counterpart({k: v for k, v in kwargs.items() if k != "betas"}) else mine).append(entry)
    return mine, other


@pytest.mark.parametrize("kind", list(INFOS), ids=lambda kind: kind.__name__)
def test_error_inputs_raise_as_torch_does(kind):
    mine, other = errors(kind)
    assert (len(mine), len(other)) == (10, 2)  # the two others need foreach=True
    for entry in mine:
        given = entry.optimizer_error_input
        assert entry.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = [torch.nn.Parameter(torch.randn(1, 1))] if given.params is None else given.params
        if entry.error_type is UserWarning:
            with pytest.warns(UserWarning, match=entry.error_regex):
                pk.MaskedAdam(params, **given.kwargs)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(entry.error_type) as theirs:
                kind(params, **given.kwargs)
            with pytest.raises(entry.error_type) as ours:
                pk.MaskedAdam(params, **given.kwargs)
        assert re.search(entry.error_regex, str(theirs.value))
        if "betas must be either" in entry.error_regex:
            # Betas are floats here, so we cannot offer "or both Tensors".
            assert "betas must be both floats" in str(ours.value)
        else:
            assert str(ours.value) == str(theirs.value)
