"""Whole runs over ranks: from recipe to pipeline, resumed on other numbers of ranks, killed, stalled, and wrong from the start."""

import json
import os
import random
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from launch import COMMON, run, start
from limits import ENDED_S
from ranks import run_ranks
from safetensors.torch import load_file
from zero_cases import without_a_launcher

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
WEIGHTS = Path("pipeline/unet/diffusion_pytorch_model.safetensors")


def keys(model, output, *more):
    return ["digits_plain", f"model={model}", f"output={output}", "engine.stall_s=600", *COMMON, *more]


def steps_logged(output):
    path = Path(output) / "run.jsonl"
    if not path.is_file():
        return -1
    events = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return max((event["step"] for event in events), default=-1)


def test_a_run_over_ranks_leaves_the_folder_of_any_run(tiny_model, tmp_path):
    out = tmp_path / "run"
    job = run(
        tmp_path / "logs",
        2,
        *keys(tiny_model, out, "engine.zero=3", "steps=4", "checkpoint.every=2", "evaluate.every=2"),
    )
    for name in ("recipe.yaml", "run.jsonl", "mask.safetensors", "metrics.json", "report.html", str(WEIGHTS)):
        assert (out / name).is_file(), name
    first, second = job.outputs()
    assert "weights outside the mask are bit-identical" in first
    assert second == ""  # one process speaks
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["outside_mask"]["before_sha256"] == metrics["outside_mask"]["after_sha256"]
    assert metrics["cost"]["images"] == 4 * 8 * 4
    assert metrics["cost"]["flops"] is None

    from pecker_fast.runs.finished import export_run

    again = export_run(out, output=tmp_path / "again")
    for name, tensor in load_file(out / WEIGHTS).items():
        assert load_file(again / "unet/diffusion_pytorch_model.safetensors")[name].equal(tensor)


def test_a_killed_rank_ends_the_run_which_resumes_to_the_same_weights(tiny_model, tmp_path):
    kill_and_resume(tiny_model, tmp_path, world=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 10))
def test_ranks_killed_at_random_times(seed, tiny_model, tmp_path):
    kill_and_resume(tiny_model, tmp_path, world=2 if seed % 3 else 4, seed=seed)


def kill_and_resume(model, folder, world, seed):
    rng = random.Random(seed)
    zero = f"engine.zero={1 + seed % 3}"
    settings = [zero, "steps=24", "checkpoint.every=6"]
    run(folder / "whole", world, *keys(model, folder / "a", *settings))
    job = start(folder / "killed", world, *keys(model, folder / "b", *settings))
    at = rng.randrange(1, 16)
    job.wait_for(lambda: steps_logged(folder / "b") >= at - at % 6)
    time.sleep(rng.random() / 5)
    victim = rng.randrange(world)
    job.processes[victim].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    codes = job.wait(ENDED_S)
    print(
        f"world {world}, {zero}, rank {victim} killed: all ended after {time.monotonic() - begun:.1f} s, codes {codes}"
    )
    assert all(codes)
    printed = "".join(job.outputs())
    assert f"rank {victim}" in printed
    assert "resumes from the last checkpoint" in printed
    assert "Traceback" not in printed
    resumed = run(folder / "resumed", world, *keys(model, folder / "b", *settings))
    assert "resumed" in resumed.outputs()[0] or steps_logged(folder / "b") == 24
    assert (folder / "a" / WEIGHTS).read_bytes() == (folder / "b" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_stalled_rank_is_named_and_ends_the_run(tiny_model, tmp_path):
    out = tmp_path / "run"
    job = start(tmp_path / "logs", 2, *keys(tiny_model, out, "engine.zero=2", "steps=100000", "engine.stall_s=10"))
    job.wait_for(lambda: steps_logged(out) >= 10)
    os.kill(job.processes[1].pid, signal.SIGSTOP)
    codes = job.wait(ENDED_S)
    assert all(codes)
    assert "rank 1 (process" in job.outputs()[0]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM])
def test_a_signal_to_one_rank_saves_and_stops_all(signum, tiny_model, tmp_path):
    out = tmp_path / "run"
    job = start(tmp_path / "logs", 2, *keys(tiny_model, out, "engine.zero=1", "steps=100000", "checkpoint.every=0"))
    job.wait_for(lambda: steps_logged(out) >= 10)
    job.processes[1].send_signal(signum)
    codes = job.wait(ENDED_S)
    assert codes == [128 + signum] * 2, "\n".join(job.outputs())
    assert "stopped by SIGTERM; the checkpoint is written" in job.outputs()[0]
    assert list((out / "checkpoints").glob("step-*/manifest.json"))


@pytest.mark.parametrize(
    ("more", "of_rank", "message"),
    [
        (["engine.zero=0"], {}, "engine.zero: 0 is one process, but 2 were started"),
        (["engine.zero=1", "batch_size=7"], {}, "batch_size: 7 samples cannot be shared by 2 ranks; give a multiple of 2"),
        (["engine.zero=1"], {1: ["seed=5"]}, "the ranks were started with different recipes (rank 1 and rank 0)"),
        (["engine.zero=1"], {1: ["model=/nowhere"]}, "the ranks were started with different recipes"),
    ],
)  # fmt: skip
def test_mistakes_are_told_once_and_end_all_ranks(more, of_rank, message, tiny_model, tmp_path):
    job = start(tmp_path / "logs", 2, *keys(tiny_model, tmp_path / "run", "steps=4", *more), of_rank=of_rank)
    assert job.wait() == [2, 2]
    lines = [line for text in job.outputs() for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_alone_a_refusal_uses_nothing_up_and_nothing_is_left_in_the_environment(tiny_model, tmp_path):
    """What follows in the process, and what it starts, would take itself for a rank: no line, no code of a signal."""
    ((refusal, before, after, checkpoints),) = run_ranks(1, without_a_launcher, tiny_model, tmp_path)
    assert refusal.startswith("engine.zero: the springs of method sa")
    assert checkpoints > 0
    assert after == before
