"""Out of memory, on the CPU and the GPU, in every phase: one line with what to lower, exit code 2, and no checkpoint lost."""

import pytest
import torch

from pecker_fast import cli
from pecker_fast.errors import OutOfMemory, lack_of_memory
from pecker_fast.recipe import recipe_to_yaml
from pecker_fast.records import checkpoint
from pecker_fast.runs import train

TOO_MUCH = 1 << 50
PHASES = {
    "load": "pecker_fast.loading.parts.load_denoiser",
    "saliency": "pecker_fast.forgetting.SaliencyPass.batch_loss",
    "step": "pecker_fast.engine.LocalEngine.generator_step",
    "figures": "pecker_fast.runs.judging.one_step_sample",
}


def of_the_cpu():
    torch.empty(TOO_MUCH)


def of_python():
    bytearray(TOO_MUCH)


def of_the_gpu():
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB"
    )


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("short", [of_the_cpu, of_python, of_the_gpu])
def test_a_run_without_memory_is_one_line(tiny_recipe, tmp_path, monkeypatch, capsys, phase, short):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(tiny_recipe(distill_steps=1, checkpoint={"every": 1})))
    with monkeypatch.context() as patch:
        patch.setattr(PHASES[phase], lambda *arguments, **keys: short())
        assert cli.main(["train", str(path), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "out of memory" in line
    assert "internal" not in line
    if phase == "load":
        return
    assert "engine.micro_batch=1" in line
    assert "batch_size below 4" in line
    assert ("of the GPU" in line) == (short is of_the_gpu)
    assert {of_the_gpu: "2.00 GiB", of_the_cpu: f"{4 * TOO_MUCH} bytes"}.get(short, "") in line
    for folder in checkpoint.list_checkpoints(tmp_path / "run"):
        checkpoint.verify_checkpoint(folder)


def test_other_errors_are_none():
    for error in (RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(28, "No space left on device")):
        assert lack_of_memory(error) is None
    assert lack_of_memory(OSError(12, "Cannot allocate memory")) == "out of memory"
    assert lack_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")) == "out of memory of the GPU"


def test_the_library_raises_its_own_error(tiny_recipe, monkeypatch):
    monkeypatch.setattr(PHASES["step"], lambda *arguments, **keys: of_the_cpu())
    with pytest.raises(OutOfMemory, match=r"out of memory .* more were asked for"):
        train(tiny_recipe(), quiet=True)


def test_every_verb_without_memory_is_one_line(capsys, monkeypatch, tmp_path):
    for name, words in {"sample_run": ["sample"], "evaluate_run": ["evaluate"], "export_run": ["export"]}.items():
        monkeypatch.setattr(f"pecker_fast.runs.{name}", lambda *arguments, **keys: of_the_cpu())
        assert cli.main([*words, str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("error: out of memory")
