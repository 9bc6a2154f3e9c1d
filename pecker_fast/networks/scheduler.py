"""Scheduler configs of diffusers: which of them mean the schedule of DDPM, and what of their keys is followed or refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecker_fast import files
from pecker_fast.errors import ModelError

CONFIG = "scheduler_config.json"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# Their models were trained on x_t = a_t x_0 + b_t e at whole timesteps; how they go from one to the next is their own affair.
FOLLOWED = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "LMSDiscrete", "HeunDiscrete", "SASolver"),
        *("EulerDiscrete", "EulerAncestralDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"),
        *("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"),
    )
)
# a piece of a class's name → what its models are
_OTHERS = {
    "FlowMa": "flow matching",
    "EDM": "the noise levels of EDM",
    "KarrasVe": "the noise levels of EDM",
    "CMStochastic": "a consistency model",
    "LCM": "a distilled consistency model: give the model it was distilled from",
    "TCD": "a distilled consistency model: give the model it was distilled from",
    "ScoreSde": "a score-based differential equation",
    "VQ": "discrete tokens",
    "RePaint": "inpainting",
    "UnCLIP": "the prior of unCLIP",
    "CogVideoX": "a shifted schedule for video",
    "IPNDM": "a continuous schedule",
    "Cosine": "continuous noise levels",
}
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
# what else would change the meaning of a timestep, and the values that do not
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_flow_sigmas": (None, False),
    "use_dynamic_shifting": (None, False),
    "timestep_type": (None, "discrete"),
    "shift": (None, 1, 1.0),
    "shift_terminal": (None,),
    "snr_shift_scale": (None, 1, 1.0),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "sigma_data": (None,),
    "predict_epsilon": (None, True),
}
_CLIPPING = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
_SPREAD = ("linear", "scaled_linear", "squaredcos_cap_v2")  # beta schedules that every scheduler here knows
_LIKE = {"DPMSolverSDEScheduler": "HeunDiscreteScheduler"}  # has the same defaults, and needs no other package


def read_scheduler(folder: Path) -> tuple[Path, dict[str, Any], Any]:
    """(path, content, diffusers class) of a scheduler folder's config. Raises ModelError for a kind that is not followed.

    The class is the one `from_pretrained` makes: model_index.json names it, else the config, else it is DDPM's.
    """
    path = folder / CONFIG
    config = files.read_config(path, "scheduler")
    name = _followed(config.get("_class_name", "DDPMScheduler"), path)
    root = folder.parent if folder.name == "scheduler" else folder
    if (root / "model_index.json").is_file():
        index = files.read_json(root / "model_index.json", error=ModelError)
        entry = index.get("scheduler") if isinstance(index, dict) else None
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
            name = _followed(entry[1], root / "model_index.json")
    import diffusers

    _check_keys(config, path)
    return path, config, getattr(diffusers, _LIKE.get(name, name))


def _followed(name: Any, path: Path) -> str:
    if isinstance(name, str) and name in FOLLOWED:
        return name
    what = next((what for piece, what in _OTHERS.items() if piece in str(name)), "another kind of process")
    raise ModelError(
        f"{path}: {str(name)[:80]} ({what}) is not supported: the noise of its model is not that of DDPM; supported are "
        "those of discrete timesteps, such as DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler"
    )


def _check_keys(config: Mapping[str, Any], path: Path) -> None:
    """Raise ModelError, naming the key, where one would change what a timestep or the network's output means."""
    prediction = config.get("prediction_type") or "epsilon"
    if prediction not in PREDICTION_TYPES:
        raise ModelError(
            f"{path}: prediction_type {prediction!r} is not supported (one of {', '.join(PREDICTION_TYPES)})"
        )
    for key, neutral in _NEUTRAL.items():
        if (value := config.get(key)) not in neutral and not (key == "predict_epsilon" and prediction == "sample"):
            raise ModelError(f"{path}: {key} {value!r} is not supported: it changes what the model's timesteps mean")


def betas_of(path: Path, config: Mapping[str, Any], kind: Any) -> tuple[Tensor, dict[str, Any]]:
    """(betas, float32 [T]; the config keys that any other scheduler of diffusers makes the same betas of).

    Keys that are missing take the defaults of the class, which differ. Raises ModelError.
    """
    defaults = inspect.signature(kind.__init__).parameters
    given: dict[str, Any] = {key: config[key] for key in _BETAS if key in defaults and config.get(key) is not None}
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in defaults:
        raise ModelError(
            f"{path}: rescale_betas_zero_snr is a key that {kind.__name__} ignores; name a scheduler that follows it, such "
            "as DDIMScheduler, or take the key out"
        )
    for key in _BETAS[:4]:
        given.setdefault(key, defaults[key].default)
    spread = given["beta_schedule"] in _SPREAD or "trained_betas" in given
    kind = type(kind.__name__, (kind,), {"set_timesteps": _no_timesteps})
    try:
        betas = kind(**given).betas
        raw = betas if spread else kind(**{key: given[key] for key in _BETAS[:4]}).betas
    except Exception as error:  # whatever the values of a foreign config are, it is the config that is wrong
        raise ModelError(f"{path}: not a schedule diffusers knows ({' '.join(str(error).split())[:200]})") from error
    if len(betas) != given["num_train_timesteps"]:
        raise ModelError(
            f"{path}: trained_betas are {len(betas)}, num_train_timesteps is {given['num_train_timesteps']}; "
            "they must be as many"
        )
    if not bool(((betas > 0) & (betas <= 1)).all()):
        raise ModelError(f"{path}: every beta must lie above 0 and not above 1; the schedule is not one of a diffusion")
    if not spread:
        kept: dict[str, Any] = {
            key: given[key] for key in ("num_train_timesteps", "rescale_betas_zero_snr") if key in given
        }
        given = {**kept, "trained_betas": raw.tolist()}
    return betas, given


def _no_timesteps(scheduler: Any, *_: Any, **__: Any) -> None:
    """In the place of `set_timesteps`, which some schedulers call when they are made: each timestep is compared with each."""
    scheduler.sigmas = torch.zeros(0)


def clipping_of(config: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """How the model's own sampler bounds its prediction of x_0: keys of DDIMScheduler; nothing where it does not."""
    defaults = inspect.signature(kind.__init__).parameters
    found = {key: config.get(key, defaults[key].default) for key in _CLIPPING if key in defaults}
    return {"clip_sample": False, **found}


def check_signal(path: Path, a: Tensor, prediction_type: str) -> None:
    """Raise ModelError where the last timesteps hold no signal and the network predicts noise: it then tells nothing."""
    if prediction_type == "epsilon" and not bool((a > 0).all()):
        key = "rescale_betas_zero_snr"
        raise ModelError(
            f"{path}: {key} (zero terminal SNR) with prediction_type epsilon: nothing of the image is left at timestep "
            f"{int((a <= 0).nonzero()[0])}, and noise does not tell it; if the network predicts velocity, say v_prediction, "
            f"else take {key} out"
        )
