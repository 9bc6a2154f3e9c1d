"""What a run has cost, part by part and in memory, as it stands in metrics.json."""

from collections.abc import Callable
from typing import Any

from pecker_fast.account.memory import ITERATION, Prediction, size
from pecker_fast.engine import TrainState
from pecker_fast.recipe import Recipe


def memory_of(prediction: Prediction | None, state: TrainState, say: Callable[[str], object]) -> dict[str, int] | None:
    """Peak bytes of an iteration, as predicted before loading and as measured; None where nothing was predicted."""
    account = state.accounts.get(state.stage)
    if prediction is None or account is None:
        return None
    predicted = max(n for name, n in prediction.phases.items() if name in ITERATION)
    measured = account["peak_allocated_bytes"] or account["peak_tensor_bytes"]
    say(f"memory of an iteration: predicted {size(predicted)}, measured {size(measured)}")
    return {"predicted_bytes": predicted, "measured_bytes": measured}


def parts_of(
    recipe: Recipe, state: TrainState, mask_cost: dict[str, float], earlier: dict[str, Any]
) -> dict[str, Any] | None:
    """One iteration part by part, of the last stage this process has iterated in; else what `earlier` metrics have.

    mask_cost: of one mask.
    """
    account = state.accounts.get("forget") or state.accounts.get("distill")
    if account is None:
        return earlier.get("cost", {}).get("parts")  # type: ignore[no-any-return]
    over = recipe.mask.refresh or recipe.steps
    return {**account, "mask": {key: value / max(over, 1) for key, value in mask_cost.items()}}
