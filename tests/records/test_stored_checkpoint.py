"""A run that an earlier version left half-way goes on: checkpoint, mask and recipe are read, it ends where a whole run ends.

`stored/` was written by 0.1.0 before its modules were moved into rooms: a tiny model, and a run of four steps killed after two.
"""

import json
import shutil
from pathlib import Path

import torch

from pecker_fast.recipe import load_recipe
from pecker_fast.records import latest_checkpoint, verify_checkpoint
from pecker_fast.runs import train

STORED = Path(__file__).parent / "stored"


def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("run/recipe.yaml")
    assert verify_checkpoint(latest_checkpoint(Path("run"), warn=print))["step"] == 2
    run = train(recipe, quiet=True).run_dir
    starts = [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines() if '"start"' in line]
    assert [start["resumed_from"] for start in starts] == [None, 2]
    whole = train(recipe.model_copy(update={"output": "whole"}), quiet=True).run_dir
    resumed, expected = (
        load_file(folder / "pipeline/unet/diffusion_pytorch_model.safetensors") for folder in (run, whole)
    )
    start = load_file("model/unet/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(resumed[name], start[name]) for name in resumed)
    for name, tensor in expected.items():  # on another processor the last bits of the first two steps may differ
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-6)
    masks = [folder / "mask.safetensors" for folder in (STORED / "run", run)]
    assert masks[0].read_bytes() == masks[1].read_bytes()
