"""Steps that take up what the step before knew, against steps that know nothing: the same bits, whatever was changed between."""

import copy

import pecker_kernels as pk
import torch

SHAPES = ((9, 4), (16,), (3, 8), (2, 3, 2, 2), (1,))


def fresh(impl, device, masked, **options):
    draw = torch.Generator().manual_seed(0)
    named = [(f"p{i}", torch.nn.Parameter(torch.randn(s, generator=draw).to(device))) for i, s in enumerate(SHAPES)]
    for _, p in named:
        p.grad_dtype = None  # of any format
    mask = pk.SaliencyMask.random(named, density=0.4, seed=1) if masked else None
    return named, pk.MaskedAdam(named, mask, 1e-2, (0.9, 0.999), impl=impl, **options)


def give(named, step, leave_out=(), dtype=torch.float32, turned=False, keep=False):
    """Gradients of a step; keep: written into those that are there."""
    draw = torch.Generator().manual_seed(100 + step)
    for i, (_, p) in enumerate(named):
        g = torch.randn(p.shape, generator=draw).to(p.device, dtype)
        if turned and p.dim() == 2:
            g = g.t().contiguous().t()
        if i in leave_out:
            p.grad = None
        elif keep and p.grad is not None:
            p.grad.copy_(g)
        else:
            p.grad = g


def _load(named, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _other_entry(named, optimizer):
    p = named[0][1]
    optimizer.state[p]["exp_avg_sq"] = 4 * optimizer.state[p]["exp_avg_sq"]


def _other_dict(named, optimizer):
    p = named[1][1]
    optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}
    optimizer.state[p]["exp_avg"].mul_(-1)


def _state_moved(named, optimizer):
    held = optimizer.state[named[2][1]]["exp_avg"]
    held.data = held.data.clone().mul_(3)


def _weights_moved(named, optimizer):
    for _, p in named:
        p.data = p.data.clone() + 1


def _weights_turned(named, optimizer):
    if optimizer.mask is None:  # masked weights are to be contiguous
        for _, p in named:
            p.data = p.data.t().contiguous().t() if p.dim() == 2 else p.data.clone()
            for state in ("exp_avg", "exp_avg_sq"):
                held = optimizer.state[p][state]
                held.data = held.data.t().contiguous().t() if p.dim() == 2 else held.data.clone()


def _counter_written(named, optimizer):
    optimizer.state[named[0][1]]["step"].fill_(7.0)


def _other_mask(named, optimizer):
    if optimizer.mask is not None:
        optimizer.set_mask(pk.SaliencyMask.random(named, density=0.6, seed=5))


def _average(named, optimizer):
    optimizer.param_groups[0]["ema"] = 0.9


def _new_group(named, optimizer):
    if optimizer.mask is None and len(optimizer.param_groups) == 1:
        more = torch.nn.Parameter(torch.ones(5, device=named[0][1].device))
        optimizer.add_param_group({"params": [("more", more)]})
        more.grad = torch.full_like(more, 0.5)


def _nothing(named, optimizer):
    pass


# name: (what is done before each step, by step; how its gradients are given)
CHANGES = {
    "nothing": ({}, {}),
    "gradients written in place": ({}, {i: {"keep": True} for i in range(1, 9)}),
    "a gradient missing": ({}, {3: {"leave_out": (1,)}, 4: {"leave_out": (1, 2)}, 6: {"leave_out": (0,)}}),
    "gradients of another format": ({}, {3: {"dtype": torch.bfloat16}, 5: {"dtype": torch.bfloat16}}),
    "gradients turned": ({}, {2: {"turned": True}, 3: {"turned": True}, 6: {"turned": True}}),
    "state loaded": ({3: _load}, {}),
    "an entry of the state": ({3: _other_entry}, {i: {"keep": True} for i in range(1, 9)}),
    "a state": ({3: _other_dict}, {i: {"keep": True} for i in range(1, 9)}),
    "state moved": ({3: _state_moved}, {i: {"keep": True} for i in range(1, 9)}),
    "weights moved": ({3: _weights_moved, 5: _weights_moved}, {i: {"keep": True} for i in range(1, 9)}),
    "weights turned": ({3: _weights_turned}, {i: {"keep": True} for i in range(1, 9)}),
    "a counter": ({4: _counter_written}, {i: {"keep": True} for i in range(1, 9)}),
    "the mask": ({3: _other_mask}, {}),
    "an average": ({3: _average}, {}),
    "a group": ({3: _new_group}, {}),
}


def run(change, impl, device, masked, forget, **options):
    """All that a run of nine steps comes to; forget: nothing is known of the step before."""
    named, optimizer = fresh(impl, device, masked, **options)
    before, how = CHANGES[change]
    for step in range(9):
        give(named, step, **how.get(step, {}))
        before.get(step, _nothing)(named, optimizer)
        if forget:
            optimizer._plans.clear()
        if step == 7 and masked:  # a step of the other rule between
            optimizer.step([torch.ones_like(p) for _, p in named])
        else:
            optimizer.step()
    state = [value.clone() for p in optimizer.state.values() for value in p.values()]
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]] + state


def check_change(change, impl, device, masked, **options):
    known, unknown = (run(change, impl, device, masked, forget, **options) for forget in (False, True))
    assert len(known) == len(unknown)
    for a, b in zip(known, unknown):
        assert torch.equal(a, b)


def planned_anew(impl, device, masked):
    """How often a plan is made in six plain steps, the gradients of each in other memory."""
    named, optimizer = fresh(impl, device, masked)
    made = []
    for step in range(6):
        give(named, step)
        optimizer.step()
        made.append(optimizer._plans[0].alike)
    return made.count(False)
