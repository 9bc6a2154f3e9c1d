"""The table of all methods: its commands, its means, and what it shows where a method was not run."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench")]

import methods_table  # noqa: E402

from pecker_fast.recipe import load_recipe, methods  # noqa: E402
from pecker_fast.runs.comparing import COLUMNS, rows_of  # noqa: E402


def run(method, seed, **figures):
    return {
        "method": method,
        "seed": seed,
        "run": f"{method}-{seed}",
        **dict.fromkeys(c.key for c in COLUMNS),
        **figures,
    }


def compared(*runs):
    return {"runs": list(runs), "rows": rows_of(runs)}


@pytest.mark.parametrize("world", methods_table.WORLDS.values(), ids=methods_table.WORLDS)
def test_every_pair_is_a_recipe_of_every_method(world):
    for pair in world.pairs:
        arguments = methods_table.command(world, pair, "out")
        assert arguments[:2] == ["compare", world.recipe]
        assert ("--never" in arguments) == (pair in world.never)
        keys = [one for one in arguments if "=" in one]
        for name in world.methods.split(","):
            if name in methods():
                recipe = load_recipe(world.recipe, [f"method={name}", *keys])
                assert recipe.evaluate.final == (1000 if world.recipe == "digits" else 400)
                assert recipe.cover == load_recipe(world.recipe, keys).cover


def test_means_are_over_pairs_and_seeds_and_what_is_missing_is_a_dash():
    pairs = {
        "a → b": compared(
            run("spare", 0, ua=1.0, training_s=10.0), run("spare", 1, ua=0.9, training_s=20.0), run("esd", 0, ua=0.5)
        ),
        "c → d": compared(run("spare", 0, ua=0.8, training_s=30.0), run("spare", 1, ua=0.7, training_s=40.0)),
    }
    found = methods_table.worst_and_mean(pairs, "spare", "ua")
    assert found == {"mean": pytest.approx(0.85), "low": 0.7, "high": 1.0}
    assert methods_table.worst_and_mean(pairs, "esd", "cover_rate") is None
    whole, each = methods_table.table(pairs).split("\n\n")
    assert "| spare | many steps | 85.0 % (70.0–100.0) |" in whole
    assert "UA: a → b, c → d" in each
    assert next(line for line in each.splitlines() if line.startswith("| spare")).startswith(
        "| spare | 95.0 % · 75.0 %"
    )
    assert next(line for line in each.splitlines() if line.startswith("| esd")).startswith("| esd | 50.0 % · – |")
