"""How an iteration runs: nothing waits for the device, NaN is met late there, memory stays as it is, keys do what they say."""

import contextlib
import gc
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pecker_fast.engine import LocalEngine
from pecker_fast.engine.blocks import compile_blocks, repeated_blocks
from pecker_fast.errors import NonFiniteError, RecipeError
from pecker_fast.loading.parts import load_parts
from pecker_fast.machine.signals import StopFlag
from pecker_fast.recipe import recipe_from
from pecker_fast.runs.loop import iteration, run_stage

RULES = ["differentiated", "salient_only", "alternating"]
aten = torch.ops.aten
# a read of a device value by the host, or a shape that depends on one
WAITS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "unique_dim",
    "_unique2",
    "allclose",
}
HOST_DATA = {"lift_fresh", "lift_fresh_copy"}  # torch.tensor(numbers): a copy from unpinned memory


class NoWaiting(TorchDispatchMode):
    """Counts operations for which a GPU would be waited for, except in the CPU optimizer: its Triton twin has tests of its own."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        moved = name == "_to_copy" and (kwargs or {}).get("device") not in (None, args[0].device)
        if (name in WAITS or name in HOST_DATA or boolean or moved) and not in_cpu_optimizer():
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def in_cpu_optimizer():
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith(("adam/cpu.py", "adam/step.py")):
            return True
        frame = frame.f_back
    return False


def late(engine):
    return LocalEngine(engine.recipe, engine.conditions, engine.device, late=True)


def values(state):
    named = {f"θ.{n}": p for n, p in state.generator.named_parameters()}
    named |= {f"ψ.{n}": p for n, p in state.score.named_parameters()}
    named |= {f"ema.{n}": p for n, p in (state.ema or {}).items()}
    for name, optimizer in state.optimizers.items():
        for i, moments in enumerate(optimizer.state.values()):
            named |= {f"{name}.{i}.{key}": value for key, value in moments.items()}
    return {name: value.detach().clone() for name, value in named.items()}


ATTACKED = {"conditions": 3, "restart": 1, "starts": ["forget", "kept", "random"], "samples": 4, "share": 1.0}


@pytest.mark.parametrize("rule", [*RULES, "attacked"])
def test_nothing_in_an_iteration_waits_for_the_device(setup, rule):
    keys = {"adversary": ATTACKED} if rule == "attacked" else {"update_rule": rule}
    _, engine, state, _ = setup(guidance={"text_dropout": 0.5, "score": 1.5}, **keys)
    engine = late(engine)
    engine.attacks.begin(state)
    iteration(engine, state)  # class tables and optimizer state are made here
    with NoWaiting() as mode:
        iteration(engine, state)
        if rule == "attacked":  # each start once
            iteration(engine, state)
            iteration(engine, state)
    assert mode.found == []


@pytest.mark.parametrize(
    "sync",
    [
        lambda s: float(next(s.generator.unet.parameters()).detach().sum()),
        lambda s: torch.tensor([1.0, 2.0]),
        lambda s: next(s.generator.unet.parameters())[next(s.generator.unet.parameters()) > 0],
        lambda s: bool(torch.isfinite(next(s.generator.unet.parameters())).all()),
    ],
)
def test_the_counter_sees_a_planted_wait(setup, sync):
    _, engine, state, _ = setup()
    engine = late(engine)
    iteration(engine, state)
    apply = state.updates.apply
    state.updates.apply = lambda *given: (sync(state), apply(*given))[1]
    with NoWaiting() as mode:
        iteration(engine, state)
    assert len(mode.found) >= 1


@pytest.mark.some(1)
@pytest.mark.parametrize("rule", RULES)
def test_late_and_at_once_give_the_same_weights(setup, rule):
    results = []
    for wrap in (lambda e: e, late):
        _, engine, state, _ = setup(update_rule=rule, seed=3)
        engine = wrap(engine)
        for _ in range(3):
            iteration(engine, state)
            engine.look(state)
        engine.settle(state)
        results.append(values(state))
    for name, value in results[0].items():
        if name.startswith("ema."):  # two operations in place of one lerp
            assert torch.allclose(value, results[1][name], rtol=1e-5, atol=1e-7), name
        else:
            assert torch.equal(value, results[1][name]), name


@contextlib.contextmanager
def broken(network):
    bias = network.unet.conv_out.bias
    good = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("nan"))
    yield
    with torch.no_grad():
        bias.copy_(good)


@pytest.mark.parametrize("rule", RULES)
def test_a_late_look_names_the_first_failure_and_nothing_was_written_since(setup, rule):
    _, engine, state, _ = setup(update_rule=rule)
    engine = late(engine)
    for _ in range(2):
        iteration(engine, state)
        engine.look(state)
    with torch.no_grad():
        state.teacher.unet.conv_out.bias.fill_(float("nan"))  # θ's gradient, not ψ's
    iteration(engine, state)  # iteration 2: ψ is stepped, θ is not
    engine.look(state)  # looks at iteration 1
    frozen = values(state)
    iteration(engine, state)  # iteration 3 must leave no trace, ψ's included
    with pytest.raises(NonFiniteError, match=r"forget step 2: the gradient of generator tensor \S+ is not finite"):
        engine.look(state)
    after = values(state)
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)
    assert state.step == 2


def test_a_late_look_names_the_score_network(setup):
    _, engine, state, _ = setup()
    engine = late(engine)
    iteration(engine, state)
    before = values(state)
    draw = engine.draw

    def poisoned(state, role, branch):
        batch = draw(state, role, branch)
        if role == "score" and state.step == 1:
            batch.e.fill_(float("inf"))
        return batch

    engine.draw = poisoned
    iteration(engine, state)
    iteration(engine, state)
    engine.guard.record(1)
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient of score network tensor"):
        engine.settle(state)
    after = values(state)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_failure_that_does_not_come_back_is_still_raised(setup):
    _, engine, state, _ = setup()
    engine = late(engine)
    iteration(engine, state)
    with broken(state.teacher):
        iteration(engine, state)
    engine.look(state)
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient of the generator is not finite"):
        engine.settle(state)


@pytest.mark.some(2)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_loop_saves_nothing_after_a_late_failure(setup, steps):
    recipe, engine, state, _ = setup()
    engine = late(engine)
    with torch.no_grad():
        state.teacher.unet.conv_out.bias.fill_(float("nan"))
    saved = []
    with StopFlag() as stop, pytest.raises(NonFiniteError, match="step 0"):
        run_stage(recipe, engine, state, steps, saved.append, [], stop, saved.append)
    assert saved == []


def live_bytes():
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # Tensors without memory of their own, as compilers leave behind, are of other types.
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not torch._is_functional_tensor(thing):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.some(1)
@pytest.mark.parametrize("wait", [False, True])
def test_no_tensor_outlives_an_iteration(setup, wait):
    _, engine, state, _ = setup()
    engine = late(engine) if wait else engine
    for _ in range(2):
        iteration(engine, state)
        engine.look(state)
    sizes = []
    for _ in range(4):
        iteration(engine, state)
        engine.look(state)
        sizes.append(live_bytes())
    assert len(set(sizes)) == 1, sizes
    kept = [torch.empty(1000)]
    assert live_bytes() == sizes[0] + 4 * kept[0].numel()  # the gate sees a leak


def test_learning_rates_rise_over_the_warm_up(setup):
    _, engine, state, _ = setup(lr={"generator": 1e-3, "score": 4e-3, "warmup": 4}, update_rule="alternating")
    seen = []
    for _ in range(6):
        iteration(engine, state)
        rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in state.optimizers.items()}
        assert rates["generator_forget"] == rates["generator_retain"]
        seen.append((rates["generator_retain"], rates["score"]))
    assert seen == [(share * 1e-3, share * 4e-3) for share in (0.25, 0.5, 0.75, 1, 1, 1)]


def test_without_warm_up_every_step_has_the_recipes_rate(setup):
    recipe, engine, state, _ = setup(lr=3e-4)
    iteration(engine, state)
    assert [o.param_groups[0]["lr"] for o in state.optimizers.values()] == [recipe.lr.score, recipe.lr.generator]


@pytest.mark.parametrize(
    "where", ["cpu", "cpu:0"]
)  # what is put on "cuda" is on "cuda:0", and what is put on "cpu:0" on "cpu"
def test_rates_on_a_device_keep_their_place(setup, where):
    recipe, _, state, _ = setup(lr={"generator": 1e-3, "score": 1e-3, "warmup": 10})
    state.set_learning_rates(recipe.lr, torch.device(where))
    first = [o.param_groups[0]["lr"] for o in state.optimizers.values()]
    state.step = 4
    state.set_learning_rates(recipe.lr, torch.device(where))
    assert all(o.param_groups[0]["lr"] is lr for o, lr in zip(state.optimizers.values(), first))
    assert [float(lr) for lr in first] == [5e-4, 5e-4]
    state.set_learning_rates(recipe.lr)
    assert state.score_optimizer.param_groups[0]["lr"] == 5e-4


def test_a_blend_is_the_average_and_copies_nothing(setup):
    _, engine, state, _ = setup(ema=0.9)
    iteration(engine, state)
    start = {name: average.clone() for name, average in state.ema.items()}
    weights = dict(state.generator.named_parameters())
    state.blend_ema(torch.zeros(()))
    assert all(torch.equal(average, start[name]) for name, average in state.ema.items())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        state.blend_ema(torch.tensor(0.25))
    for name, average in state.ema.items():
        assert torch.allclose(
            average, start[name] + 0.25 * (weights[name].detach() - start[name]), rtol=1e-6, atol=1e-8
        )
    largest = max(4 * p.numel() for p in weights.values())
    assert max(event.self_cpu_memory_usage for event in seen.key_averages()) < largest


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_graphs_are_refused_without_a_gpu(setup, tiny_recipe):
    recipe, engine, _, _ = setup()
    asked = tiny_recipe(engine={"cuda_graph": True})
    with pytest.raises(RecipeError, match=r"^engine\.cuda_graph: needs a GPU"):
        load_parts(asked)
    with pytest.raises(RecipeError, match=r"^engine\.cuda_graph: needs a GPU"):
        LocalEngine(asked, engine.conditions, torch.device("cpu"))
    assert not recipe.engine.cuda_graph


def test_threads(setup):
    before = torch.get_num_threads()
    try:
        setup(engine={"threads": before + 1})
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", [True, False])
def test_channels_last_is_the_order_of_what_the_networks_are_fed(setup, wanted):
    _, _, state, _ = setup(engine={"channels_last": wanted})
    for network in (state.teacher, state.score, state.generator, state.averaged_generator()):
        seen = []
        network.unet = lambda x, t, class_labels, return_dict, to=seen: (to.append(x.stride()), (x,))[1]
        out = network.output(torch.rand(2, 3, 8, 8), torch.zeros(2), torch.zeros(2))
        assert seen == [(192, 1, 24, 3) if wanted else (192, 64, 8, 1)]
        assert out.shape == (2, 3, 8, 8)


def test_compiled_blocks_are_the_outermost_repeated_ones(setup):
    _, _, state, _ = setup()
    names = dict(state.generator.unet.named_modules())
    blocks = repeated_blocks(state.generator.unet)
    found = {name for name, module in names.items() if any(module is block for block in blocks)}
    assert found == {n for n in names if n.split(".")[-1].isdigit() and n.split(".")[-2] in ("resnets", "attentions")}
    with pytest.raises(RecipeError, match=r"^engine\.compile: Linear has no repeated blocks"):
        compile_blocks(torch.nn.Linear(2, 2))


def test_compiled_blocks_leave_names_and_copies_alone(setup, monkeypatch):
    """The compiler itself is replaced by one that counts: see the slow test for what it makes."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *a, **k: (calls.append(1), f(*a, **k))[1])
    _, engine, state, _ = setup(engine={"compile": "blocks"})
    before = [name for name, _ in state.generator.named_parameters()]
    iteration(engine, state)
    per_iteration = len(calls)
    assert per_iteration > 0
    iteration(engine, state)
    assert len(calls) == 2 * per_iteration  # compiled once, not once more in each iteration
    assert [name for name, _ in state.generator.named_parameters()] == before
    calls.clear()
    state.averaged_generator().unet(torch.zeros(1, 1, 8, 8), 0, class_labels=torch.zeros(1, dtype=torch.int64))
    assert calls == []


@pytest.mark.slow
def test_compiled_blocks_take_the_same_step(setup):
    results = []
    for choice in ("none", "blocks"):
        _, engine, state, _ = setup(engine={"compile": choice}, optimizer={"eps": 1.0})
        losses = [iteration(engine, state) for _ in range(2)]
        results.append((losses[-1], state.averaged_generator()))
    for name, loss in results[0][0].items():
        assert float(loss) == pytest.approx(float(results[1][0][name]), rel=1e-4), name


@pytest.mark.parametrize("key", ["cuda_graph", "channels_last"])
def test_engine_switches_take_truth_values_only(key):
    with pytest.raises(RecipeError, match=rf"engine\.{key}: expected"):
        recipe_from({"engine": {key: 1}})
