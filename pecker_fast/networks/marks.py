"""What a weights file says of itself beside its weights: its prediction type, zero terminal SNR, that it is no teacher."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from pecker_fast import files
from pecker_fast.errors import ModelError
from pecker_fast.networks.schedule import Schedule

KIND, T_INIT, PREDICTION = "pecker_fast.kind", "pecker_fast.t_init", "modelspec.prediction_type"
MARKS = (KIND, T_INIT, PREDICTION)
ONE_STEP, MANY_STEPS, ZERO_SNR = "one-step generator", "model of many steps", "zero terminal SNR"
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"  # empty tensors by which SDXL files of this kind are known
_SAID = {
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "velocity"), "v_prediction"),
    **dict.fromkeys(("epsilon", "eps", "noise"), "epsilon"),
    **dict.fromkeys(("sample", "x0"), "sample"),
}
_SHORT = {"v_prediction": "v"}
_PREDICTION_KEYS = (PREDICTION, "modelspec.predict_key", "prediction_type")
_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


def one_step_marks(schedule: Schedule, t_init: int) -> dict[str, str]:
    """Metadata of an exported generator's weights file."""
    return {KIND: ONE_STEP, T_INIT: str(t_init), **_prediction(schedule)}


def many_steps_marks(schedule: Schedule) -> dict[str, str]:
    """Metadata of the weights file of a result that is an ordinary model."""
    return {KIND: MANY_STEPS, **_prediction(schedule)}


def _prediction(schedule: Schedule) -> dict[str, str]:
    return {PREDICTION: _SHORT.get(schedule.prediction_type, schedule.prediction_type)}


def prediction_keys(schedule: Schedule) -> tuple[str, ...]:
    """Names of the empty tensors that a single file of SDXL holds for this schedule."""
    if schedule.prediction_type != "v_prediction":
        return ()
    return (V_KEY, ZERO_SNR_KEY) if not bool((schedule.a > 0).all()) else (V_KEY,)


def refuse_one_step(folder: Path) -> None:
    """Raise ModelError where a model's folder or single file is a one-step generator: it is nobody's teacher."""
    if _one_step_head(folder) is not None:
        raise ModelError(
            f"{folder}: a one-step generator cannot be the teacher; give the model it came from (to forget more, name it all "
            "in one run), or use it as generator="
        )


def one_step_start(folder: Path, otherwise: int) -> int | None:
    """The timestep at which a model's network takes its one step, `otherwise` where it says nothing of that; None where it is an
    ordinary denoiser. Raises ModelError."""
    head = _one_step_head(folder)
    if head is None:
        return None
    said = head.get(T_INIT, "")
    return int(said) if said.isdecimal() else otherwise


def _one_step_head(folder: Path) -> Mapping[str, str] | None:
    """Metadata of the weights of a folder or single file that is a one-step generator, empty where its card alone says so; None
    where it is none."""
    card = files.read_json(folder / "model.json", error=ModelError) if (folder / "model.json").is_file() else {}
    weights = [folder] if folder.is_file() else files.weight_files(files.unet_folder(folder))
    heads = (files.read_head(file, error=ModelError)[1] for file in weights)
    marked = next((head for head in heads if head.get(KIND) == ONE_STEP), None)
    if marked is None and isinstance(card, dict) and card.get("kind") == ONE_STEP:
        return {}
    return marked


def check_said(path: Path, schedule: Schedule, where: Path | str) -> None:
    """Raise ModelError where a single file, or a folder's UNet, says another schedule of itself than the one read at `where`."""
    prediction = schedule.prediction_type
    snr = ZERO_SNR if not bool((schedule.a > 0).all()) else "false"
    for file in [path] if path.is_file() else files.weight_files(files.unet_folder(path)):
        names, metadata = files.read_head(file, error=ModelError)
        for key, said in said_of(names, metadata).items():
            key_of, ours = ("rescale_betas_zero_snr", snr) if said == ZERO_SNR else ("prediction_type", prediction)
            if said != ours:
                raise ModelError(
                    f"{file}: {key} says {said}, but {where} has {key_of} {ours}; give configs that are the "
                    f"file's own, or correct {key_of} there"
                )


def said_of(names: Collection[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """Key or tensor → the prediction type, or `ZERO_SNR`, that it stands for."""
    said = {key: _SAID.get(value.strip().lower(), value) for key in _PREDICTION_KEYS if (value := metadata.get(key))}
    if str(metadata.get("ss_v_parameterization")).lower() == "true":
        said["ss_v_parameterization"] = "v_prediction"
    if V_KEY in names:
        said[V_KEY] = "v_prediction"
    if ZERO_SNR_KEY in names:
        said[ZERO_SNR_KEY] = ZERO_SNR
    if str(metadata.get("ss_zero_terminal_snr")).lower() == "true":
        said["ss_zero_terminal_snr"] = ZERO_SNR
    said |= {name: "the noise levels of EDM" for name in _EDM if name in names}
    return said
