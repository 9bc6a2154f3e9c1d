"""inputs.json of a run folder: what the names in its recipe stood for when the run began.

A recipe names models, judges and prompt files by paths that hold where it was started, and by files that may change. Here are
those paths in full, as seen from the run folder too, and the prompts themselves, so that a run can be moved, copied and used
from anywhere. recipe.yaml keeps the user's own words.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.errors import CheckpointError, ModelError, PeckerError
from pecker_fast.loading import Model, inlined_prompts
from pecker_fast.recipe import Recipe

INPUTS = "inputs.json"
_REMEDY = "delete it to go by the names in recipe.yaml"
FORMAT, VERSION = "pecker-fast inputs", 2  # 1 had no checksum
PATHS = ("model", "model_config", "generator", "evaluate.judge", "mask.data", "images.source", "engine.deepspeed")
_WORDS = {"mask.data": ("pseudo", "teacher"), "images.source": ("pool", "trajectory")}  # that are no paths
_ATTRIBUTES = {"model_config": "config_folder"}


@dataclass(frozen=True)
class Inputs:
    """By dotted key: `names` as the recipe has them, `paths` in full, `beside` as seen from the run folder, `prompts`."""

    base_sha256: str
    names: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)

    def found(self, key: str, run_dir: Path) -> Path | None:
        """Where the file or folder of a key lies now; None where it is nowhere."""
        return next((path for path in self.places(key, run_dir) if path.exists()), None)

    def places(self, key: str, run_dir: Path) -> list[Path]:
        """Where it is looked for: where it was, where it lies if it was moved with the run, and by its name from here."""
        names = (self.paths[key], run_dir / self.beside[key], self.names[key])
        return list(dict.fromkeys(Path(os.path.abspath(name)) for name in names))

    def located(self, recipe: Recipe, run_dir: Path, needed: tuple[str, ...] = ()) -> Recipe:
        """The recipe with every path where it lies now, and with the prompts of the run.

        Keys whose name is not the run's any more are left alone. Raises ModelError where one of `needed` is nowhere.
        """
        located = recipe
        for key in self.paths:
            if _value(recipe, key) != self.names[key]:
                continue
            path = self.found(key, run_dir)
            if path is None and key in needed:
                looked = ", ".join(map(str, self.places(key, run_dir)))
                raise ModelError(f"{key}: {self.names[key]} of this run is gone (looked for at {looked}); put it back")
            located = _with(located, key, str(path or self.paths[key]))
        for key, value in self.prompts.items():
            if _value(recipe, key) == self.names[key]:
                located = _with(located, key, value)
        return located


def take_inputs(recipe: Recipe, located: Recipe, run_dir: Path, model: Model, base_sha256: str) -> Inputs:
    """Of a run that begins or goes on. located: the recipe by whose paths `model` was loaded.

    Raises RecipeError for a prompt file that cannot be read.
    """
    paths = {}
    for key in PATHS:
        value = _value(located, key)
        if isinstance(value, str) and _is_local(key, value):
            paths[key] = os.path.abspath(value)
    home = os.path.abspath(run_dir)
    beside = {key: os.path.relpath(path, home) for key, path in paths.items()}
    prompts = inlined_prompts(located, model.text.configs) if model.text is not None else {}
    prompts = {key: value for key, value in prompts.items() if value != _value(recipe, key)}
    names = {key: _value(recipe, key) for key in (*paths, *prompts)}
    return Inputs(base_sha256, names, paths, beside, prompts)


def write_inputs(run_dir: Path, inputs: Inputs) -> None:
    """Raises OutputError."""
    files.write_sealed(run_dir / INPUTS, {"format": FORMAT, "version": VERSION, **vars(inputs)})


def read_inputs(run_dir: Path) -> Inputs | None:
    """None for a run of an earlier version. Raises CheckpointError where the file is damaged."""
    path = run_dir / INPUTS
    if not path.is_file():
        return None
    found = files.read_sealed(path, error=CheckpointError, remedy=_REMEDY)
    earlier = found.get("version") == 1
    if found.get("format") != FORMAT or not (earlier or found.get("version") == VERSION):
        raise CheckpointError(f"{path}: no {FORMAT} of version 1 or {VERSION}; {_REMEDY}")
    if not earlier:
        files.read_sealed(path, error=CheckpointError, sealed=True, remedy=_REMEDY)
    parts = {key: found.get(key) for key in ("names", "paths", "beside", "prompts")}
    whole = all(isinstance(part, dict) for part in parts.values()) and isinstance(found.get("base_sha256"), str)
    texts = [text for key in ("paths", "beside") for text in (parts[key] or {}).values()]
    if not whole or not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{path}: damaged; {_REMEDY}")
    known = set(parts["names"] or {})
    if not (set(parts["prompts"] or {}) <= known and set(parts["paths"] or {}) == set(parts["beside"] or {}) <= known):
        raise CheckpointError(f"{path}: damaged; {_REMEDY}")
    return Inputs(found["base_sha256"], **parts)  # type: ignore[arg-type]


def changed_prompts(inputs: Inputs, recipe: Recipe) -> str | None:
    """The first key whose prompt file does not say any more what the run began with; None where all do, or are gone."""
    try:
        now = inlined_prompts(recipe)
    except PeckerError:
        return None
    return next((key for key, value in inputs.prompts.items() if now.get(key) != value), None)


def _is_local(key: str, value: str) -> bool:
    if key in _WORDS:
        return value not in _WORDS[key]
    return value not in files.shipped_models() and os.path.exists(value)


def _value(recipe: Recipe, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return getattr(getattr(recipe, section) if section else recipe, _ATTRIBUTES.get(name, name))


def _with(recipe: Recipe, key: str, value: Any) -> Recipe:
    """The recipe with another value of a dotted key, whatever else was given staying given."""
    section, _, name = key.rpartition(".")
    if section:
        return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={name: value})})
    return recipe.model_copy(update={_ATTRIBUTES.get(name, name): value})
