"""Protocols over a finished run: what is asked, what is judged, what is refused."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from many_steps import text_recipe
from tiny_text_models import tiny_clip

from pecker_fast.errors import PeckerError, RecipeError
from pecker_fast.evaluate import SmallClassifier, save_word_judge
from pecker_fast.runs import evaluate_protocol
from pecker_fast.runs.start import train

pytestmark = pytest.mark.usefixtures("no_forecast")


def test_a_run_is_judged_by_clip(sd1, tmp_path):
    clip = tiny_clip(tmp_path / "clip")
    run = train(text_recipe(sd1, tmp_path / "run", method="uce", steps=0), quiet=True).run_dir
    found = evaluate_protocol(run, "clip", samples=4, clip=clip)
    assert set(found["clip_score"]) == {"forget", "forget:cover", "retain"}
    assert found == evaluate_protocol(run, "clip", samples=4, clip=clip)
    assert found != evaluate_protocol(run, "clip", samples=4, clip=clip, before=True)
    (tmp_path / "prompts.txt").write_text("a red dog\n")
    assert set(
        evaluate_protocol(run, "clip", samples=2, clip=clip, prompts=tmp_path / "prompts.txt")["clip_score"]
    ) == {"prompts"}
    for keys, says in (
        ({}, "takes a folder of a CLIP model"),
        ({"clip": clip, "detectors": ["x"]}, "leave detectors out"),
    ):
        with pytest.raises(RecipeError, match=says):
            evaluate_protocol(run, "clip", **keys)
    with pytest.raises(RecipeError, match="and no other does"):
        evaluate_protocol(run, "celebrity", ["x"], clip=clip)


def test_a_run_is_judged_by_unlearncanvas(sd1, tmp_path):
    torch.manual_seed(0)
    words = {"style": ["Crayon", "Pop Art"], "object": ["circle", "Dogs", "Sea"]}
    judge = tmp_path / "judge"
    save_word_judge(judge, SmallClassifier(3, 32, 5, width=4, features=8), words)
    keys = {"evaluate": {"judge": str(judge)}, "steps": 0, "ema": 0}
    run = train(text_recipe(sd1, tmp_path / "run", method="uce", **keys), quiet=True).run_dir
    found = evaluate_protocol(run, "unlearncanvas", seeds=2)
    assert found["samples"] == 2 * 2  # circles in two styles
    assert found["seeds"] == [188, 288]
    assert 0 <= found["ira"] <= 1
    assert found == evaluate_protocol(run, "unlearncanvas", seeds=2)
    assert evaluate_protocol(run, "unlearncanvas", seeds=2, before=True)["samples"] == 4
    with pytest.raises(RecipeError, match="give neither"):
        evaluate_protocol(run, "unlearncanvas", ["x"])
    plain = train(text_recipe(sd1, tmp_path / "plain", method="uce", steps=0), quiet=True).run_dir
    with pytest.raises(PeckerError, match="judge"):
        evaluate_protocol(plain, "unlearncanvas")
