"""Nothing is exported that is no weights: trained to NaN, or beyond what the dtype of the base's file can hold."""

import pytest
import torch
from small_runs import small_run
from tiny_models import write_tiny_model

from pecker_fast import files
from pecker_fast.errors import NonFiniteError
from pecker_fast.records import checkpoint
from pecker_fast.records.manifest import STATE
from pecker_fast.runs import export_run

QUICK = {"evaluate": {"every": 0, "final": 0, "teacher_steps": 2}}


def with_average(run, value):
    """The newest checkpoint with another average of one weight, its hashes put right."""
    newest = checkpoint.list_checkpoints(run)[-1]
    average = files.read_tensors(newest / "ema.safetensors")[0]
    average["conv_out.weight"].view(-1)[0] = value
    files.write_tensors(newest / "ema.safetensors", average)
    content = files.read_sealed(newest / files.MANIFEST)
    files.write_sealed(newest / files.MANIFEST, {**content, "files": files.entries_of(newest, (files.MANIFEST,))})
    assert (newest / STATE).is_file()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of a base whose file is float16."""
    home = tmp_path_factory.mktemp("sound")
    model = write_tiny_model(home / "model")
    path = model / "unet" / files.WEIGHTS_NAME
    files.write_tensors(path, {k: t.half() for k, t in files.read_tensors(path)[0].items()}, {"format": "pt"})
    return small_run(model, home / "run", **QUICK)


@pytest.mark.parametrize(
    ("form", "value"),
    [
        ("diffusers", float("nan")),
        ("unet", float("nan")),
        ("unet", 70_000.0),
        ("delta", 70_000.0),
        ("delta", -float("inf")),
    ],
)
def test_no_format_takes_them(run, tmp_path, form, value):
    with_average(run, 1.0)
    out = tmp_path / "out.safetensors"
    export_run(run, tmp_path / "whole.safetensors", form=form)
    with_average(run, value)
    with pytest.raises(NonFiniteError, match=r"out\.safetensors: tensor conv_out\.weight would hold NaN, infinity"):
        export_run(run, out, form=form)
    assert not out.exists()
    assert torch.tensor(value).half().isfinite().logical_not().item()  # as it would be stored
