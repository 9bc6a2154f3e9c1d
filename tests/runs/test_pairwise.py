"""Every value of a recipe's keys beside every other: a run of two steps ends, or is refused in one line before it starts.

Rows come from a covering array, so that each pair of values that is not on the list of refusals has run, and did something, in at
least one of them. The first rows of it hold most pairs; the slow tests run all rows, of several arrays, books and report included.
"""

import shutil
from pathlib import Path

import pytest
import torch
from covering import covering
from pairs import ELSEWHERE, class_space, denoiser_space, nested, one_line, short, text_space
from safetensors.torch import load_file

from pecker_fast.errors import PeckerError
from pecker_fast.recipe import recipe_from, recipe_help
from pecker_fast.runs.start import train

FIRST = {"classes": 5, "sd1": 2, "denoisers": 5}  # rows that hold most pairs
SPACES = {"classes": class_space, "denoisers": denoiser_space}


@pytest.fixture(scope="module")
def spaces(tmp_path_factory):
    made = {}

    def space(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = SPACES[kind](folder) if kind in SPACES else text_space(folder, kind)
        return made[kind]

    return space


def plain(space):
    return {key: values[0] for key, values in space.values.items()}


def runs_to_its_end(row):
    recipe = recipe_from(nested(row))
    run = train(recipe, quiet=True).run_dir
    weights = load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert (run / "pipeline" / "model_index.json").is_file() or (run / "pipeline" / "scheduler").is_dir()
    shutil.rmtree(run)


@pytest.fixture
def light(monkeypatch, no_books):
    """Runs without books, forecast and report, most of the time of one so small; they have tests of their own."""
    monkeypatch.setattr("pecker_fast.runs.start.check_memory", lambda recipe: None)
    monkeypatch.setattr("pecker_fast.runs.start.planned", lambda recipe, device: [])
    monkeypatch.setattr("pecker_fast.runs.training.write_report", lambda run: run)


def check_rows(space, rows):
    failed = []
    for row in rows:
        try:
            runs_to_its_end(row)
        except Exception as error:  # all of them are told at once
            failed.append(f"{type(error).__name__}: {error}\n    {short(row, plain(space))}")
            shutil.rmtree(row["output"], ignore_errors=True)
    assert not failed, f"{len(failed)} of {len(rows)} rows:\n" + "\n".join(failed)


@pytest.mark.parametrize("kind", FIRST)
def test_most_pairs_of_values_run(spaces, light, kind):
    space = spaces(kind)
    rows, never = covering(space)
    lost = [pair for pair in never if space.possible(pair)]
    assert not lost, lost  # whatever is not refused can be run
    held = set().union(*(space.covered(space.indices(row)) for row in rows[: FIRST[kind]]))
    assert len(held) > 0.3 * len(space.pairs() - never)
    assert set().union(*(space.covered(space.indices(row)) for row in rows)) >= space.pairs() - never
    check_rows(space, rows[: FIRST[kind]])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["classes", "sd1", "sdxl", "denoisers"])
def test_every_pair_of_values_runs(spaces, kind, seed):
    check_rows(spaces(kind), covering(spaces(kind), seed)[0])


@pytest.mark.parametrize("kind", ["classes", "sd1", "denoisers"])
def test_what_is_refused_is_refused_in_one_line_before_anything_is_written(spaces, light, kind):
    space = spaces(kind)
    for one in space.all_refused:
        for case in one.cases():
            row = {**plain(space), **case}
            with pytest.raises(PeckerError) as error:
                train(recipe_from(nested(row)), quiet=True, dry_run=True)
            assert one_line(str(error.value), one.why), (case, str(error.value))
            assert not Path(row["output"]).exists()


def test_every_key_of_the_recipe_has_values(spaces):
    keys = {key for key, *_ in recipe_help()}
    for kind in ("classes", "sd1"):
        assert set(spaces(kind).values) == keys - set(ELSEWHERE)
