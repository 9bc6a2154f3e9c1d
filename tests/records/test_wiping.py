"""A run that starts over: whatever step of the wiping fails or is the last of a killed process, the next start goes through."""

import pytest
from disk_faults import failing, killed, steps_of

from pecker_fast import files
from pecker_fast.recipe import recipe_from
from pecker_fast.records import inputs as inputs_file
from pecker_fast.records import run_folder
from pecker_fast.records.inputs import Inputs

HELD = (
    *("metrics.json", "inputs.json", "mask.safetensors", "report.html", "run.jsonl", "samples/after.png"),
    *("pipeline/model.json", "pipeline/unet/weights", "checkpoints/step-000002/manifest.json", "mask.png"),
)
TORN = (
    *(
        ".report.html.tmp-0123abcd",
        ".recipe.yaml.tmp-0123abcd",
        ".mask.safetensors.a1b2_3d4",
        ".pipeline.tmp-0123abcd/x",
    ),
    *(".pipeline.old-0123abcd/x", "samples/.after.png.tmp-0123abcd", "checkpoints/.tmp-step-000004-0123abcd/x"),
    *("checkpoints/.step-000004.tmp-0123abcd/x", ".checkpoints.gone-0123abcd/step-000001/x"),
)
USERS = ("notes.txt", ".notes.txt.tmp-0123abcd", "samples.txt", ".mask.safetensors.mine")


def recipe(run, **keys):
    return recipe_from({"output": str(run), "resume": "never", **keys})


def grow(run, names):
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)


def finished(run):
    files.write_text(run / run_folder.RECIPE, run_folder.MARK + "steps: 7\n")
    grow(run, HELD)


def start_over(run, **keys):
    given = recipe(run, **keys)
    with run_folder.locked(run):
        run_folder.open_run_folder(given, run_folder.plan_run_folder(given, {}), Inputs("0"))


def held(run):
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())


FRESH = sorted((run_folder.LOCK, inputs_file.INPUTS, run_folder.RECIPE))


@pytest.mark.parametrize("end", [failing, killed])
@pytest.mark.parametrize("found", [finished, lambda run: run.mkdir()], ids=["finished", "empty"])
def test_every_step_of_starting_over(tmp_path, monkeypatch, end, found):
    found(tmp_path / "count")
    steps = steps_of(lambda: start_over(tmp_path / "count"), monkeypatch)
    assert held(tmp_path / "count") == FRESH
    for at in range(len(steps)):
        run = tmp_path / str(at)
        found(run)
        grow(run, USERS if found is finished else ())
        end(lambda run=run: start_over(run), at, monkeypatch)
        assert run_folder.is_run_folder(run) or found is not finished, steps[at]
        run_folder.plan_run_folder(recipe(run), {})  # seen as ours, whatever it looks like
        if not (run / "checkpoints").is_dir() and found is finished:
            assert not (run / "pipeline").is_dir() or files.read_text(run / "pipeline" / "model.json")
        begun = (run / run_folder.WIPING).exists()
        start_over(
            run, resume="auto" if begun else "never"
        )  # a wipe that was begun is finished, however it is asked to resume
        assert held(run) == sorted((*FRESH, *(USERS if found is finished else ()))), steps[at]


def test_checkpoints_go_first_and_the_mark_stays(tmp_path, monkeypatch):
    """What nothing can go on from is never taken for a whole run: half wiped, a run has no checkpoints."""
    finished(tmp_path / "run")
    steps = steps_of(lambda: start_over(tmp_path / "run"), monkeypatch)
    assert steps[0] == "write:.lock"
    assert steps[1] == "write:.wiping"
    assert next(name for name in steps if not name.endswith((".lock", ".wiping", "run"))) == "rename:checkpoints"
    assert steps[-1] == "unlink:.wiping"
    assert "unlink:recipe.yaml" not in steps


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_what_a_killed_run_left_is_cleared_away_by_the_next(tmp_path, resume):
    finished(tmp_path)
    files.write_text(tmp_path / run_folder.RECIPE, run_folder.MARK)
    grow(tmp_path, (*TORN, *USERS))
    given = recipe(tmp_path, resume=resume)
    with run_folder.locked(tmp_path):
        plan = run_folder.Plan(tmp_path, None, wipe=resume == "never")
        run_folder.open_run_folder(given, plan, Inputs("0"))
    assert held(tmp_path) == sorted({*FRESH, *USERS, *(HELD if resume == "auto" else ())})


def test_a_folder_with_leftovers_alone_is_an_empty_one(tmp_path):
    """Killed while its first file was written, a run has nothing of its own yet."""
    grow(tmp_path, (".recipe.yaml.tmp-0123abcd", run_folder.LOCK))
    plan = run_folder.plan_run_folder(recipe(tmp_path, resume="auto"), {})
    assert (plan.checkpoint, plan.wipe) == (None, False)
    grow(tmp_path, ("letter.txt",))
    with pytest.raises(Exception, match="not a run folder"):
        run_folder.plan_run_folder(recipe(tmp_path), {})
