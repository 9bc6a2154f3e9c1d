"""What every run imports, imported once by the process that the tests' processes are forked from; nothing else happens in it."""

import contextlib
import importlib
import io
import os
import warnings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore")
NAMES = (
    "torch", "pecker_fast.cli", "pecker_fast.runs", "pecker_fast.report.page", "diffusers.models.unets.unet_2d",
    "diffusers.models.unets.unet_2d_condition", "diffusers.schedulers.scheduling_euler_discrete", "torchmetrics.image.fid",
    "deepspeed", "deepspeed.comm.torch", "pecker_fast.engine.zero",
)  # fmt: skip
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for name in NAMES:
        with contextlib.suppress(ImportError):  # DeepSpeed is an extra
            importlib.import_module(name)
