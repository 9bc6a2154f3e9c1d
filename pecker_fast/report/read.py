"""Everything the report needs, read from a run folder: what is missing stays empty, what is damaged is noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pecker_fast.audit import AUDIT, AUDIT_IMAGES, read_audit
from pecker_fast.errors import DataError, PeckerError, RecipeError
from pecker_fast.files import read_text
from pecker_fast.recipe import MAX_RECIPE_BYTES, methods, parse_yaml
from pecker_fast.records import EVENTS, read_events, read_metrics, recipe_doubts
from pecker_fast.report.mask import Mask

_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_PNG_BYTES = 16 << 20


@dataclass
class RunData:
    """One run. `steps` and `evaluations` are (position on the step axis, values), distillation before forgetting."""

    folder: Path
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    steps: list[tuple[float, Mapping[str, Any]]] = field(default_factory=list)
    evaluations: list[tuple[float, Mapping[str, Any]]] = field(default_factory=list)
    distill_end: float = 0.0
    status: str = ""
    mask: Mask | None = None
    grids: dict[str, bytes] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    audit_images: dict[str, bytes] = field(default_factory=dict)  # by "PROBE-SUBJECT"
    notes: list[str] = field(default_factory=list)

    @property
    def one_step(self) -> bool:
        """Whether the result is a one-step generator."""
        found = methods().get(str(self.recipe.get("method", "pecker")))
        return found is None or found.one_step


def read_run(folder: str | Path) -> RunData:
    """Read `folder`.

    Raises:
        DataError: it is no folder, or holds neither recipe.yaml nor run.jsonl nor metrics.json.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("recipe.yaml", EVENTS, "metrics.json")):
        raise DataError(f"{folder}: not a run folder (no recipe.yaml, {EVENTS} or metrics.json)")
    run = RunData(folder)
    _read_recipe(run)
    _read_metrics(run)
    _read_events(run)
    _read_mask(run)
    run.grids = _read_images(run, "samples")
    _read_audit(run)
    return run


def _read_recipe(run: RunData) -> None:
    path = run.folder / "recipe.yaml"
    if not path.is_file():
        return
    try:
        text = read_text(path, limit=MAX_RECIPE_BYTES, error=RecipeError)
        content = parse_yaml(text, "recipe.yaml")
    except PeckerError as error:
        run.notes.append(f"recipe.yaml: {str(error)[:300]}")
        return
    if (doubts := recipe_doubts(run.folder)) is not None:
        run.notes.append(doubts)  # and nothing of it is stated
        return
    run.recipe_text, run.recipe = text, content if isinstance(content, dict) else {}


def _read_metrics(run: RunData) -> None:
    try:
        run.metrics = read_metrics(run.folder)
    except PeckerError as error:
        run.notes.append(str(error))


def _read_events(run: RunData) -> None:
    path = run.folder / EVENTS
    events: list[dict[str, Any]] = []
    if path.is_file():
        try:
            events = read_events(path)
        except PeckerError as error:
            run.notes.append(str(error))
    run.start = next((event for event in reversed(events) if event["event"] == "start"), {})
    run.distill_end, run.steps, run.evaluations = timeline(events)
    last: dict[str, Any] = next((event for event in reversed(events) if event["event"] in ("start", "stop", "end")), {})
    at = f"at step {int(max([x for x, _ in run.steps], default=0))}"
    if last.get("event") == "end":
        run.status = "finished"
    elif last.get("event") == "stop":
        run.status = f"stopped {at}: {last.get('reason', 'no reason given')}"
    elif events:
        run.status = f"not finished, last seen {at}"


def timeline(
    events: Sequence[Mapping[str, Any]],
) -> tuple[float, list[tuple[float, Mapping[str, Any]]], list[tuple[float, Mapping[str, Any]]]]:
    """End of the distillation stage, step events and evaluations, each of these as (position, values) in order.

    A resumed run writes steps again that were logged before it was killed: the later record counts. Steps may count on
    through both stages or begin anew with the second; positions count on.
    """
    stage = "distill" if any(event.get("stage") == "distill" for event in events) else "forget"
    kept: dict[str, dict[tuple[bool, int], Mapping[str, Any]]] = {"step": {}, "evaluate": {}}
    for event in events:
        name, step = event.get("event"), event.get("step")
        if name == "step":
            stage = event.get("stage") or stage
        if name in kept and isinstance(step, int):
            kept[name][stage != "distill", step] = event
    seen = list(kept["step"]) + list(kept["evaluate"])
    distill_end = max([step for forgets, step in kept["step"] if not forgets], default=0)
    first_forget = min([step for forgets, step in kept["step"] if forgets], default=distill_end + 1)
    offset = distill_end if first_forget <= distill_end else 0
    if not any(forgets for forgets, _ in seen):
        offset = 0

    def placed(name: str) -> list[tuple[float, Mapping[str, Any]]]:
        found = [(step + (offset if forgets else 0), event) for (forgets, step), event in kept[name].items()]
        return sorted(((float(x), event) for x, event in found), key=lambda pair: pair[0])

    return float(distill_end), placed("step"), placed("evaluate")


def _read_mask(run: RunData) -> None:
    path = run.folder / "mask.safetensors"
    if not path.is_file():
        return
    try:
        import pecker_kernels

        run.mask = pecker_kernels.SaliencyMask.load(str(path))
    except Exception as error:  # whatever is wrong with it, the rest of the report still stands
        run.notes.append(f"mask.safetensors: {' '.join(str(error).split())[:300]}")


def _read_images(run: RunData, folder: str) -> dict[str, bytes]:
    found = {}
    for path in sorted((run.folder / folder).glob("[!.]*.png")):
        try:
            size = path.stat().st_size
            data = path.read_bytes() if size <= _MAX_PNG_BYTES else b""
        except OSError as error:
            run.notes.append(f"{folder}/{path.name}: {error.strerror or error}")
            continue
        if data.startswith(_PNG):
            found[path.stem] = data
        else:
            run.notes.append(f"{folder}/{path.name}: left out, not a PNG of at most {_MAX_PNG_BYTES >> 20} MiB")
    return found


def _read_audit(run: RunData) -> None:
    path = run.folder / AUDIT
    if not path.is_file():
        return
    try:
        run.audit = read_audit(path)
    except PeckerError as error:
        run.notes.append(str(error))
        return
    run.audit_images = _read_images(run, AUDIT_IMAGES)
