"""A run that is killed, anywhere and any number of times, comes to the very bits of one that was not."""

import random
import subprocess
import time

import pytest
from least_runs import bare, final_files, left_overs, replace_by, write_least_recipe
from limits import HUNG_S
from processes import pecker_fast

from pecker_fast import cli
from pecker_fast.records import checkpoint

KILLS = [20, pytest.param(200, marks=pytest.mark.slow)]
PASSES = {1: "engine.micro_batch=0", 3: "engine.micro_batch=1"}  # of a batch of three
RULES = ("salient_only", "differentiated", "alternating")


def trained(recipe, output, *overrides):
    assert cli.main(["train", str(recipe), f"output={output}", "--quiet", *overrides]) == 0
    return final_files(output)


@pytest.mark.parametrize(
    ("passes", "rule"),
    [
        pytest.param(passes, rule, marks=[] if (passes, rule) in ((1, RULES[0]), (3, RULES[1])) else pytest.mark.slow)
        for passes in PASSES
        for rule in RULES
    ],
)
def test_from_every_step(tmp_path, monkeypatch, passes, rule):
    replace_by(monkeypatch.setattr)
    recipe = write_least_recipe(tmp_path, evaluate={"every": 0, "final": 0})
    keys = [PASSES[passes], f"update_rule={rule}", "batch_size=3", "mask.refresh=1"]
    keys.append("checkpoint={every: 1, keep: 100}")
    want = trained(recipe, tmp_path / "whole", *keys)
    points = checkpoint.list_checkpoints(tmp_path / "whole")
    assert [point.name for point in points] == ["step-000001", "step-000002", "step-000003"]
    for point in points[:-1]:
        assert trained(recipe, tmp_path / point.name, *keys, f"resume={point}") == want, point.name
    assert trained(recipe, tmp_path / "other", *keys, "seed=1") != want


@pytest.mark.parametrize("count", KILLS)
def test_killed_at_random_times(tmp_path, count):
    """kill -9 of real processes, from their start to their end, while they start over too."""
    recipe, run = write_least_recipe(tmp_path, checkpoint={"every": 1, "keep": 2}), tmp_path / "run"
    whole, kills, rng = tmp_path / "whole", 0, random.Random(0)

    def started(output, resume):
        words = ["train", str(recipe), f"output={output}", f"resume={resume}", "--quiet"]
        return pecker_fast(*words, log=tmp_path / "log", first=bare)

    assert started(whole, "auto").wait(HUNG_S) == 0  # the first process takes longer than others
    begun = time.monotonic()
    assert started(whole, "never").wait(HUNG_S) == 0
    whole_s, want = time.monotonic() - begun, final_files(whole)
    resume = "auto"
    while True:
        process = started(run, resume)
        try:
            code = process.wait(rng.uniform(0, 1.1) * whole_s if kills < count else HUNG_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            resume = rng.choice(("auto", "auto", resume))  # killed in the wiping, it may be wiped again
            continue
        assert code == 0, (tmp_path / "log").read_text()
        assert final_files(run) == want
        assert left_overs(run) == []
        if kills == count:
            break
        resume = "never"
