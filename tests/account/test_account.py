"""What an iteration costs, part by part: against torch's own counter, cases made by hand, formulas; and looking changes nothing."""

import json
import sys
from pathlib import Path

import pecker_kernels as pk
import pytest
import torch
from pecker_kernels.cost import live_lines, step_cost
from pecker_kernels.spec import SPECS
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from pecker_fast import cli
from pecker_fast.account import Accountant, Clock, Counter, LiveBytes, clock, counted, joules
from pecker_fast.account.iteration import TIMED
from pecker_fast.errors import OutputError
from pecker_fast.machine import profile
from pecker_fast.report import cost
from pecker_fast.runs.benchmark import bench, set_up, spread
from pecker_fast.runs.loop import iteration
from pecker_fast.runs.start import train

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import baselines  # noqa: E402

RULES = ["dense", "differentiated", "salient_only", "alternating"]
SMOOTH = {"optimizer": {"eps": 1.0}, "lr": 1e-2, "weights": {"retain": 0.7, "forget": 0.3}}


@pytest.fixture
def setup(tiny_recipe):
    """make(rule, **keys) -> Setup whose ψ and θ are moved off φ, so that no loss is zero."""

    def make(rule="differentiated", **keys):
        given = {"source": "none"} if rule == "dense" else {"skip": False, **keys.get("mask", {})}
        keys |= {"mask": given} if rule == "dense" else {"mask": given, "update_rule": rule}
        made = set_up(tiny_recipe(**keys))
        for seed, network in ((1, made.state.score), (2, made.state.generator)):
            g = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for _, p in network.named_parameters():
                    p.add_(0.05 * torch.randn(p.shape, generator=g))
        return made

    return make


def everything(state):
    """Copies of all that an iteration may change."""
    tensors = [p for n in (state.score, state.generator) for _, p in n.named_parameters()]
    optimizers = (state.score_optimizer, *state.updates.optimizers.values())
    tensors += [t for o in optimizers for s in o.state.values() for t in s.values()]
    return [t.detach().clone() for t in (*tensors, *state.ema.values())]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


# -- counting -------------------------------------------------------------------------------------------------------------


@pytest.mark.some(1)
@pytest.mark.parametrize("rule", RULES)
def test_parts_add_up_to_what_torch_counts(setup, rule):
    made = setup(rule)
    made.iterate()
    account = counted(made.engine, made.state)
    with FlopCounterMode(display=False) as torch_counts:
        made.iterate()
    counted_parts = [part["flops"] for name, part in account["parts"].items() if name not in account["formulas"]]
    assert sum(counted_parts) == account["counted_flops"] == torch_counts.get_total_flops() > 0
    assert account["flops"] == sum(part["flops"] for part in account["parts"].values())
    assert set(account["formulas"]) == {"score_optimizer", "generator_optimizer", "finite_check", "ema"}
    passes = [name.removeprefix("generator_backward_") for name in account["parts"] if "generator_backward" in name]
    assert sorted(passes) == (["forget", "retain"] if rule in ("differentiated", "alternating") else ["retain_forget"])


@pytest.mark.some(1)
@pytest.mark.parametrize("rule", RULES)
def test_forward_and_backward_stand_in_their_known_proportions(setup, rule):
    """Weight gradients cost what the forward pass costs, ψ is passed back to weights and input, φ + ψ forward is two nets."""
    account = counted((made := setup(rule)).engine, made.state)
    parts, backward = account["parts"], account["generator_backward"]
    assert parts["score_samples"]["flops"] == parts["score_forward"]["flops"] == parts["generator_forward"]["flops"]
    assert parts["guide_forward"]["flops"] == 2 * parts["generator_forward"]["flops"]
    weights = parts["score_backward"]["weight_gradient_flops"]
    assert weights == backward["weight_gradient_flops"] == backward["dense_weight_gradient_flops"]
    assert "weight_gradient_flops" not in parts["guide_backward"]
    assert account["dense"]["generator_backward"]["flops"] == parts["score_backward"]["flops"]
    assert backward["live_weight_gradient_flops"] <= backward["weight_gradient_flops"]


def test_live_weight_gradients_follow_the_rows_of_the_mask(setup):
    rows = {"mask": {"structure": "row", "density": 0.25, "source": "random"}}
    salient, differentiated = (counted((m := setup(rule, **rows)).engine, m.state) for rule in RULES[2:0:-1])
    share = [a["generator_backward"]["live_weight_gradient_flops"] / a["generator_backward"]["weight_gradient_flops"]
             for a in (salient, differentiated)]  # fmt: skip
    assert 0.05 < share[0] < 0.6
    assert share[1] == pytest.approx((1 + share[0]) / 2, rel=0.05)  # its retain branch needs every row


@pytest.mark.some(1)
@pytest.mark.parametrize("rule", RULES[1:])
def test_a_masked_backward_costs_the_input_passes_and_the_live_weight_gradients(setup, rule):
    """Counted as it runs: what the account without skipping says the rule reads, within 2 %."""
    mask = {"structure": "row", "density": 0.1, "source": "random"}
    one = counted((made := setup(rule, mask={**mask, "skip": True})).engine, made.state)["generator_backward"]
    all_of_it = counted((made := setup(rule, mask=mask)).engine, made.state)
    other = all_of_it["generator_backward"]
    assert one["weight_gradient_flops"] == pytest.approx(other["live_weight_gradient_flops"], rel=0.02)
    assert 0.98 * other["input_flops"] <= one["input_flops"] <= other["input_flops"]
    assert one["weight_gradient_flops"] < 0.8 * other["weight_gradient_flops"]
    again = counted((made := setup(rule, mask={**mask, "skip": True})).engine, made.state)
    dense = all_of_it["dense"]["generator_backward"]["flops"]
    assert again["dense"]["generator_backward"]["flops"] == pytest.approx(dense, rel=0.02)


def test_a_rehearsal_leaves_no_trace(setup):
    watched, alone = setup(), setup()
    for _ in range(2):
        a, b = watched.iterate(), alone.iterate()
    images, step = watched.state.images, watched.state.step
    before = everything(watched.state)
    counted(watched.engine, watched.state)
    assert same(everything(watched.state), before)
    assert (watched.state.images, watched.state.step) == (images, step)
    assert all(p.grad is None for n in (watched.state.score, watched.state.generator) for _, p in n.named_parameters())
    assert "step" not in vars(watched.state.score_optimizer)
    a, b = watched.iterate(), alone.iterate()
    assert {k: float(v) for k, v in a.items()} == {k: float(v) for k, v in b.items()}
    assert same(everything(watched.state), everything(alone.state))


@pytest.mark.some(1)
@pytest.mark.parametrize("rule", RULES)
def test_an_accountant_changes_nothing(setup, rule):
    watched, alone = setup(rule), setup(rule)
    accountant = Accountant(watched.engine, watched.state)
    for _ in range(TIMED + 2):
        a = accountant.run(watched.iterate)
        b = alone.iterate()
        assert {k: float(v) for k, v in a.items()} == {k: float(v) for k, v in b.items()}
    assert same(everything(watched.state), everything(alone.state))
    account = watched.state.accounts["forget"]
    assert account["iterations_timed"] == TIMED
    assert watched.state.flops_per_iteration == {"forget": account["counted_flops"]}
    assert sum(part["share"] for part in account["parts"].values()) == pytest.approx(1)


def test_torchs_counter_would_change_the_step_it_counts(setup):
    """Why there is a rehearsal. Ours happens to round as torch does without it, which is what makes its bytes the true ones."""
    alone, ours, torchs = setup("dense"), setup("dense"), setup("dense")
    alone.iterate()
    with Counter({}):
        ours.iterate()
    with FlopCounterMode(display=False):
        torchs.iterate()
    assert same(everything(ours.state), everything(alone.state))
    assert not same(everything(torchs.state), everything(alone.state))


# -- parts ----------------------------------------------------------------------------------------------------------------


class Notes:
    def __init__(self):
        self.seen = []

    def enter(self, name):
        self.seen.append(f"+{name}")

    def leave(self, name):
        self.seen.append(f"-{name}")


def test_parts_are_told_only_while_somebody_listens():
    notes = Notes()

    @profile.part("b")
    def inner():
        pass

    with profile.part("a"):
        inner()
    with profile.recording(notes), profile.part("a"):
        inner()
        with pytest.raises(RuntimeError, match="listening already"), profile.recording(notes):
            pass
    with profile.part("a"), pytest.raises(ZeroDivisionError), profile.recording(notes), profile.part("c"):
        raise ZeroDivisionError
    inner()
    assert notes.seen == ["+a", "+b", "-b", "-a", "+c", "-c"]


def test_a_clock_charges_the_innermost_part():
    ticks = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 40.0, 41.0])
    timer = Clock(lambda: next(ticks))
    with timer.lap(), profile.part("a"), profile.part("b"):
        pass
    with timer.lap():
        pass
    assert timer.laps == [{"other": 1.0 + 16.0, "a": 2.0 + 8.0, "b": 4.0}, {"other": 1.0}]
    assert timer.medians() == {"other": 9.0, "a": 5.0, "b": 2.0}


def test_energy_is_none_on_a_processor_and_read_in_joules_from_nvml(monkeypatch):
    assert joules(torch.device("cpu")) is None
    readings = iter([0, 5000, 7500])

    class Nvml:
        nvmlInit = staticmethod(lambda: None)
        nvmlDeviceGetHandleByUUID = staticmethod(lambda uuid: uuid)
        nvmlDeviceGetTotalEnergyConsumption = staticmethod(lambda handle: next(readings))

    monkeypatch.setitem(sys.modules, "pynvml", Nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: type("P", (), {"uuid": "1"}))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda d: None)
    meter = joules(torch.device("cuda"))
    assert (meter(), meter()) == (5.0, 7.5)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert clock.joules(torch.device("cuda")) is None


# -- memory ---------------------------------------------------------------------------------------------------------------


def hand_made(live):
    """(live, peak) in floats after each line, as a counter with `live` sees it."""
    found = []
    counter = Counter({})
    counter.live = live
    with counter:
        a = torch.ones(1000)
        b = a[10:20]  # a view: no storage of its own
        found.append(live.live // 4)
        c = a * 2
        found.append(live.live // 4)
        del a
        found.append(live.live // 4)  # b holds it
        del b
        found.append(live.live // 4)
        c = c + 1  # for a moment both are there
        d = torch.zeros(10, requires_grad=True)
        e = d.exp()  # saved for backward
        found.append(live.live // 4)
        f = e.sum()
        del e
        found.append(live.live // 4)  # the graph holds it
        f.backward()
        del f
        found.append(live.live // 4)  # d and its gradient
    return found, live.peak // 4


HAND = ([1000, 2000, 2000, 1000, 1020, 1021, 1020], 2000)


def test_live_bytes_of_a_case_made_by_hand():
    found, peak = hand_made(LiveBytes())
    assert found == HAND[0]
    assert peak == HAND[1]


def test_the_case_tells_trackers_that_never_free_or_count_views_apart():
    class NeverFrees(LiveBytes):
        def _freed(self, key, _):
            self._held.pop(key)

    class CountsTensors(LiveBytes):
        def see(self, tensor):
            self.live += tensor.nbytes
            self.peak = max(self.peak, self.live)

    for broken in (NeverFrees, CountsTensors):
        assert hand_made(broken())[0] != HAND[0]


def test_known_tensors_count_from_the_start_and_may_go():
    known = [torch.ones(100), torch.ones(50)]
    live = LiveBytes([*known, known[0][3:]])
    assert (live.live, live.peak) == (600, 600)
    known.pop()
    assert (live.live, live.peak) == (400, 600)


def test_state_and_gradients_are_the_bytes_they_are(setup):
    n = sum(p.numel() for _, p in setup().state.generator.named_parameters())
    found = {}
    for rule in RULES:
        made = setup(rule)
        made.iterate()
        found[rule] = counted(made.engine, made.state)
    steps = 4 * len(setup().state.generator.named_parameters())  # a counter a tensor
    assert found["dense"]["optimizer_state_bytes"]["generator"] == 4 * n + steps  # β₁ = 0: one moment
    kept = setup("salient_only").mask.count
    assert found["salient_only"]["optimizer_state_bytes"]["generator"] < 4 * kept + n // 4 + 2 * steps
    assert found["dense"]["gradient_bytes"] == 4 * n
    assert found["differentiated"]["gradient_bytes"] == 8 * n
    for account in found.values():
        assert account["peak_tensor_bytes"] >= max(part["peak_tensor_bytes"] for part in account["parts"].values())
        assert account["peak_tensor_bytes"] > 3 * 4 * n  # three networks at least


def test_bytes_are_those_of_operands():
    a, b = torch.ones(10, 20), torch.ones(20, 5)
    with Counter({}) as counter:
        a @ b
        a.t()  # a view
        a.add_(1)  # read and written
        torch.ones(1).expand(1000).clone()
        torch._foreach_mul_([a, b], 2.0)
    want = 4 * (200 + 100 + 50) + 4 * 400 + 4 * (1 + 1 + 1000) + 4 * 600
    assert counter.parts["other"].bytes_moved == want


# -- formulas -------------------------------------------------------------------------------------------------------------


def test_a_step_costs_what_the_floors_say():
    p = torch.nn.Parameter(torch.zeros(512, 256))
    p.grad = torch.zeros_like(p)
    n = p.numel()

    def bytes_of(mask=None, **options):
        return step_cost(pk.MaskedAdam([("w", p)], mask, **options)).bytes_moved / n

    assert bytes_of() == 28
    assert bytes_of(betas=(0.0, 0.999)) == 20
    assert bytes_of(ema=0.9) == 36
    assert bytes_of(clip_norm=1.0, check_finite=True) == 36
    mask = pk.SaliencyMask.random([("w", p)], density=0.1, seed=0)
    assert bytes_of(mask) == pytest.approx(SPECS["masked_adam_"].bytes_moved(n, 0.1) / n, rel=0.01)
    rows = pk.SaliencyMask.random([("w", p)], density=0.1, seed=0, structure="row")
    assert bytes_of(rows) == pytest.approx(28 * rows.density + 1 / 8)
    optimizer = pk.MaskedAdam([("w", p)], mask)
    want = SPECS["differentiated_adam_"].bytes_moved(n, 0.1)
    assert step_cost(optimizer, [p.grad]).bytes_moved == pytest.approx(want, rel=0.01)
    assert step_cost(optimizer).flops == 13 * mask.count
    assert step_cost(optimizer, [p.grad]).flops == 13 * n + mask.count
    assert step_cost(optimizer, dense=True) == step_cost(pk.MaskedAdam([("w", p)]))
    p.grad = None
    assert step_cost(optimizer).bytes_moved == 0


def test_every_operation_of_ours_has_a_formula():
    ours = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if "pecker::" in name
    }
    assert ours
    assert [name for name in ours if getattr(torch.ops.pecker, name) not in flop_registry] == []


def test_live_lines_are_those_of_the_mask():
    keep = torch.zeros(100, dtype=torch.bool)
    keep[[0, 15, 16, 99]] = True
    bits = pk.SaliencyMask.from_scores({"w": keep.float()}, density=0.04).bits["w"]
    assert [live_lines(bits, lanes) for lanes in (8, 16, 32)] == [4, 3, 2]


# -- bench, report, runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_writes_what_it_prints(capsys, tmp_path):
    file = tmp_path / "bench.json"
    keys = ["digits", "batch_size=2", "mask.samples=4", "mask.density=0.1", "update_rule=salient_only"]
    assert cli.main(["bench", *keys, "--iterations", "1", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert set(found) == {"machine", "recipe", "weights", "iterations", "variants"}
    dense, masked = found["variants"]["dense"], found["variants"]["masked"]
    assert masked["optimizer_state_bytes"]["generator"] < dense["optimizer_state_bytes"]["generator"] / 5
    assert masked["parts"]["generator_optimizer"]["bytes"] < dense["parts"]["generator_optimizer"]["bytes"]
    assert masked["mask"]["flops"] > 0
    assert "mask" not in dense
    assert dense["energy_j"] is None or torch.cuda.is_available()
    for account in (dense, masked):
        assert set(account["iteration_ms"]) == {"p20", "p50", "p80"}
        assert all(part["ms"] >= 0 for part in account["parts"].values())
    for text in ("2 θ optimizer", "making the mask", "one iteration", "MB moved", "MB alive", f"figures: {file}"):
        assert text in out
    assert str(ROOT) not in file.read_text()


def test_bench_of_a_recipe_without_mask_has_one_column(tiny_recipe):
    result = bench(tiny_recipe(method="sfd"), 1)
    assert list(result["variants"]) == ["dense"]
    assert cost.heads(["dense"], ["flops", "ms"]) == ["GFLOP, dense", "ms, dense"]
    with pytest.raises(OutputError, match="not a file in a folder"):
        bench(tiny_recipe(), 1, Path("no/such/folder/file.json"))
    assert spread([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])["p50"] == 3.5


@pytest.mark.books
def test_a_run_keeps_its_account_and_shows_it(tiny_recipe, capsys):
    keys = {"steps": 8, "evaluate": {"every": 0, "final": 0}}
    run = train(tiny_recipe(**keys), quiet=True).run_dir
    account = json.loads((run / "metrics.json").read_text())["cost"]["parts"]
    assert account["iterations_timed"] == TIMED
    assert account["mask"]["ms"] > 0
    page = (run / "report.html").read_text()
    assert "One iteration, part by part" in page
    assert "GFLOP, dense" in page
    assert cli.main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert "2 θ backward" in out
    rows = {line.name: line.values for line in cost.lines(cost.of_run(account))}
    flops = rows["2 θ optimizer"]["flops"]
    assert flops[0] == account["dense"]["generator_optimizer"]["flops"] <= flops[1]
    assert rows["2 θ backward"]["flops"][0] >= rows["2 θ backward"]["flops"][1]
    parts = sum(part["ms"] for part in account["parts"].values())
    assert rows["one iteration"]["ms"][1] == pytest.approx(parts + account["mask"]["ms"])


def test_tables_leave_out_what_is_unknown():
    rows = cost.lines({"this run": {"parts": {"draws": {"flops": 0, "ms": 2.0}, "strange": 3, "ema": {"ms": "x"}}}})
    assert [line.name for line in rows] == ["draws", "average of θ", "one iteration"]
    assert cost.known(rows) == ["flops", "ms", "share"]
    assert cost.cells(rows[1], ["flops", "ms"]) == ["–", "–"]
    assert cost.cells(rows[2], ["ms"]) == ["2"]
    for odd in ({}, {"parts": [2]}, {"parts": {"ema": {"ms": True}}, "iteration_ms": {"p50": 1}, "mask": 3, "dense": {"ema": 1}},
                {"generator_backward": {"input_flops": "x"}, "dense": {"ema": {}}, "mask": {"ms": None}}):  # fmt: skip
        assert cost.parts_tables(cost.of_run(odd))


# -- baselines -------------------------------------------------------------------------------------------------------------


@pytest.mark.some(2)
@pytest.mark.parametrize("rule", baselines.RULES)
@pytest.mark.parametrize("name", baselines.BASELINES)
def test_baselines_take_the_engines_step(setup, name, rule):
    found = baselines.step_difference(setup(rule, **SMOOTH), baselines.BASELINES[name](setup(rule, **SMOOTH), rule))
    assert set(found) == {"ψ", "θ", "average"}
    assert max(found.values()) < 2e-3, found


def test_the_gate_of_the_baselines_sees_another_rule(setup):
    wrong = baselines.PlainLoop(setup("differentiated", **SMOOTH), "salient_only")
    found = baselines.step_difference(setup("differentiated", **SMOOTH), wrong)
    assert found["ψ"] < 2e-3
    assert found["θ"] > 0.1
    assert found["average"] > 1e-2


def test_upstreams_habits_are_there(setup, monkeypatch):
    calls = []
    monkeypatch.setattr(baselines.gc, "collect", lambda: calls.append("collect"))

    def encode(c):
        calls.append("encode")
        return c

    loop = baselines.UpstreamLoop(setup("dense"), "dense", encode)
    assert all(
        o.defaults["fused"] is False and o.defaults["foreach"] is False for o in (loop.psi_adam, loop.theta_adam)
    )
    loop()
    assert calls.count("collect") == 2
    assert calls.count("encode") == 2 * 2 + 2 * 3  # every forward pass of every branch
    assert len(loop.losses) == 4
    assert all(isinstance(loss, float) for loss in loop.losses)


def test_iteration_is_what_is_benched(setup):
    made = setup()
    assert iteration(made.engine, made.state).keys() == made.iterate().keys()


def test_the_rehearsal_is_no_training_and_cannot_fail_a_run(setup, monkeypatch):
    made = setup("salient_only")
    accountant = Accountant(made.engine, made.state)
    accountant.run(made.iterate)
    assert accountant.spent_s() > 0
    assert accountant.spent_s() == 0
    with torch.no_grad():
        next(made.state.score.unet.parameters()).fill_(float("nan"))
    counted(made.engine, made.state)  # of an iteration that nobody asked for


def test_a_graph_is_not_timed_by_part(setup):
    made = setup()
    made.engine.graph = object()  # stands for a graph: nothing is launched here
    accountant = Accountant(made.engine, made.state)
    monkey = iter(range(3))
    for _ in range(3):
        accountant.run(lambda: next(monkey))
    assert "iteration_ms" not in made.state.accounts["forget"]


def test_finite_checks_cost_what_they_look_at(setup):
    made = setup("salient_only", mask={"structure": "row", "density": 0.1, "source": "random", "skip": True})
    found = counted(made.engine, made.state)
    n = sum(p.numel() for _, p in made.state.score.named_parameters())
    assert n < found["parts"]["finite_check"]["flops"] < 1.6 * n  # all of ψ, the live part of θ
