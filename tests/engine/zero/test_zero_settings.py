"""What DeepSpeed is told, and what of a recipe the sharded engine refuses; none of it imports DeepSpeed."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import pytest

from pecker_fast.engine.zero.settings import check_recipe, deepspeed_settings, read_user_settings, require_deepspeed
from pecker_fast.errors import RecipeError
from pecker_fast.recipe import recipe_from


def recipe(**engine):
    return recipe_from({"batch_size": 8, "engine": {"zero": 1, **engine}})


def refused(act, *arguments):
    with pytest.raises(RecipeError) as caught:
        act(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": 9}, "batch_size: 9 samples cannot be shared by 2 ranks; give a multiple of 2"),
        ({"engine": {"micro_batch": 5}}, "engine.micro_batch: 5 is more than a rank's 4 samples; lower it"),
        ({"engine": {"compile": "blocks"}}, "engine.compile: is not supported yet with engine.zero"),
        ({"engine": {"cuda_graph": True}}, "engine.cuda_graph: is not supported with engine.zero"),
        ({"engine": {"zero": 3}, "score": "lora"}, "score: lora shares the teacher's weights"),
        ({"engine": {"shard_teacher": True}}, "engine.shard_teacher: needs engine.zero=3"),
    ],
)
def test_what_the_engine_does_not_do_is_refused(keys, message):
    base = {"batch_size": 8, "engine": {"zero": 1}}
    merged = {**base, **keys, "engine": {**base["engine"], **keys.get("engine", {})}}
    assert refused(check_recipe, recipe_from(merged), 2).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping is decided by the recipe; leave it out"),
        ({"fp16": {"enabled": True}}, "fp16 is decided by the recipe"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is decided by the recipe"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "zero_optimization.round_robin_gradients is decided"),
        ({"zero_optimization": 3}, "zero_optimization is a mapping"),
        ([], "a DeepSpeed configuration is a mapping"),
    ],
)
def test_keys_that_would_change_what_is_computed_are_refused_by_name(given, message, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(given))
    assert message in refused(read_user_settings, path)


def test_free_keys_are_taken_over_and_ours_stay(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({"zero_optimization": {"reduce_bucket_size": 5, "overlap_comm": True}, "steps_per_print": 3})
    )
    settings = deepspeed_settings(recipe(deepspeed=str(path), offload="cpu"), 2)
    assert settings["steps_per_print"] == 3
    assert settings["gradient_clipping"] == 0.0  # DeepSpeed clips to 1 where nothing is said
    assert settings["train_micro_batch_size_per_gpu"] == 4
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["overlap_comm"]) == (1, 5, True)
    assert zero["offload_optimizer"]["device"] == "cpu"


def test_a_missing_or_old_deepspeed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'pecker-fast[deepspeed]'" in refused(require_deepspeed)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.18.2")
    assert "DeepSpeed 0.18.2 is too old" in refused(require_deepspeed)


def test_without_zero_deepspeed_is_not_imported():
    code = "import sys, pecker_fast.runs.start, pecker_fast.runs.finished; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_verb_of_one_process_refuses_ranks():
    from pecker_fast.runs.benchmark import set_up

    assert "engine.zero: bench measures one process" in refused(set_up, recipe())
