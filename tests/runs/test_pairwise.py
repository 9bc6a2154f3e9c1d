"""Every value of a recipe's keys beside every other: a run of two steps ends, or is refused in one line before it starts.

Rows come from a covering array, so that each pair of values that is not on the list of refusals has run, and did something, in at
least one of them.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from covering import Refused, Space, covering
from pairs import ELSEWHERE, REFUSED, class_space, nested, one_line, short, text_space

from pecker_fast.errors import PeckerError, RecipeError
from pecker_fast.recipe import recipe_from, recipe_help
from pecker_fast.runs.start import train


@pytest.fixture(scope="module")
def spaces(tmp_path_factory):
    made = {}

    def space(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = class_space(folder) if kind == "classes" else text_space(folder, kind)
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


def check_rows(space, seed):
    rows, never = covering(space, seed)
    assert not {pair for pair in never if space.allows(dict(pair), pair[0][0])}  # whatever is not refused can be run
    failed = []
    for row in rows:
        try:
            runs_to_its_end(row)
        except Exception as error:  # all of them are told at once
            failed.append(f"{type(error).__name__}: {error}\n    {short(row, plain(space))}")
            shutil.rmtree(row["output"], ignore_errors=True)
    assert not failed, f"{len(failed)} of {len(rows)} rows:\n" + "\n".join(failed)


@pytest.mark.parametrize("kind", ["classes", "sd1"])
def test_every_pair_of_values_runs(spaces, kind):
    check_rows(spaces(kind), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", ["classes", "sd1", "sd2", "sdxl"])
def test_every_pair_of_values_runs_in_other_company(spaces, kind, seed):
    check_rows(spaces(kind), seed)


@pytest.mark.parametrize("kind", ["classes", "sd1"])
def test_what_is_refused_is_refused_in_one_line_before_anything_is_written(spaces, kind):
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
