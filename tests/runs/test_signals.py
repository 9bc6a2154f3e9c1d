"""Signals: in every phase a run is left with whole checkpoints and the code of the signal, and ends the same when it goes on."""

import os
import signal
import time

import pytest
import torch
from least_runs import final_files, finished_run, left_overs, replace_by
from torch import nn

from pecker_fast import cli
from pecker_fast.cli.stopping import stoppable
from pecker_fast.errors import Interrupted, Stopped
from pecker_fast.machine import StopFlag, answering
from pecker_fast.records import checkpoint

ANSWER_S = 10.0
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
PHASES = {  # what is called in it
    "load": "pecker_fast.runs.start.load_parts",
    "saliency": "pecker_fast.forgetting.SaliencyPass.batch_loss",
    "threshold": "pecker_fast.forgetting.SaliencyPass.cut",
    "step": "pecker_fast.engine.LocalEngine.generator_step",
    "evaluation": "pecker_fast.runs.judging.one_step_sample",
    "save": "pecker_fast.records.checkpoint._write_files",
    "export": "pecker_fast.runs.training.export_folder",
}


class Once:
    """What is called in a phase, with a signal to this process before it the first time."""

    def __init__(self, real, signum):
        self.real, self.signum, self.sent_s = real, signum, None

    def __get__(self, instance, owner):
        return lambda *arguments, **keys: self(instance, *arguments, **keys) if instance is not None else self

    def __call__(self, *arguments, **keys):
        if self.sent_s is None:
            self.sent_s = time.monotonic()
            os.kill(os.getpid(), self.signum)
        return self.real(*arguments, **keys)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A recipe, and what its run comes to when nothing happens to it."""
    recipe, run = finished_run(tmp_path_factory.mktemp("whole"))
    return recipe, final_files(run)


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase(whole, tmp_path, monkeypatch, capsys, phase):
    recipe, want = whole
    replace_by(monkeypatch.setattr)
    for signum, code in SIGNALS.items():
        output = tmp_path / str(code)
        with monkeypatch.context() as patch:
            once = Once(resolve(PHASES[phase]), signum)
            patch.setattr(PHASES[phase], once)
            before = [signal.getsignal(s) for s in SIGNALS]
            assert cli.main(["train", str(recipe), f"output={output}", "--quiet"]) == code
        assert time.monotonic() - once.sent_s < ANSWER_S
        assert [signal.getsignal(s) for s in SIGNALS] == before
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1
        assert told[0].startswith(f"error: stopped by {signum.name}")
        for folder in checkpoint.list_checkpoints(output):
            checkpoint.verify_checkpoint(folder)
        assert bool(checkpoint.list_checkpoints(output)) == (phase != "load")  # nothing to keep before the first stage
        assert not output.is_dir() or left_overs(output) == []
    assert cli.main(["train", str(recipe), f"output={output}", "--quiet"]) == 0
    assert final_files(output) == want


def resolve(name):
    from importlib import import_module

    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except ImportError:
        return resolve(module).__dict__[attribute]


class Layers(nn.Module):
    """A slow network in small: it counts its layers, forward and backward, and sends itself a signal in one of them."""

    def __init__(self, forward_at=None, backward_at=None):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(50)])
        self.at = forward_at, backward_at
        self.done = [0, 0]

    def count(self, way):
        self.done[way] += 1
        if self.done[way] == self.at[way]:
            os.kill(os.getpid(), signal.SIGTERM)

    def forward(self, x):
        for weight in self.weights:
            self.count(0)
            x = Layer.apply(x, weight, self)
        return x


class Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, layers):
        ctx.layers = layers
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        ctx.layers.count(1)
        return grad, grad, None


@pytest.mark.parametrize(("way", "at"), [(0, 7), (1, 9)])
def test_a_signal_is_answered_within_a_layer(way, at):
    network = Layers(**{("forward_at", "backward_at")[way]: at})
    with (
        StopFlag() as stop,
        pytest.raises(Interrupted, match="stopped by SIGTERM; the rest is made again"),
        stop.at_once("the rest is made again"),
        answering(network.parameters()),
    ):
        network(torch.ones(2)).sum().backward()
    assert network.done[way] <= at + 1


def test_outside_what_may_be_left_a_signal_waits():
    network = Layers(forward_at=7)
    with StopFlag() as stop:
        network(torch.ones(2)).sum().backward()
        assert network.done == [50, 50]
        with pytest.raises(Interrupted), stop.at_once("x"):
            raise AssertionError("it was told to stop before it began")
        with pytest.raises(Interrupted, match="SIGTERM; y"):
            stop.check("y")
        with pytest.raises(Stopped):  # nobody has listened so far
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a third would end the process without a word
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_ends_a_run_in_one_line(whole, tmp_path, monkeypatch, capsys):
    recipe, _ = whole
    step = resolve(PHASES["step"])

    def twice(*arguments, **keys):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        return step(*arguments, **keys)

    monkeypatch.setattr(PHASES["step"], twice)
    assert cli.main(["train", str(recipe), f"output={tmp_path / 'run'}", "--quiet"]) == 129
    assert capsys.readouterr().err == "error: stopped by SIGHUP\n"
    assert left_overs(tmp_path / "run") == []


def test_what_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signum is None
        with stoppable(for_good=False):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("verb", ["export", "sample", "evaluate", "report"])
def test_other_verbs_end_where_they_stand(whole, tmp_path, monkeypatch, capsys, verb):
    run = whole[0].parent / "run"
    name = {"report": "pecker_fast.report.write_text"}.get(verb, "pecker_fast.runs.finished.load_run")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    once = Once(resolve(name), signal.SIGTERM)
    monkeypatch.setattr(name, once)
    assert cli.main([verb, str(run)]) == 143
    assert once.sent_s is not None
    assert capsys.readouterr().err == "error: stopped by SIGTERM\n"
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
