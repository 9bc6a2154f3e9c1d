"""`--parts-of`: VAE and judges of a finished model, taken over instead of being made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.errors import ModelError

VAE = "vae"
JUDGES = files.JUDGES
_NAMES = (files.CONFIG_NAME, files.WEIGHTS_NAME, "model.safetensors", "reference.safetensors")


@dataclass(frozen=True)
class Taken:
    """Parts of another model. model: as it was named. sha256: of each part, over its files."""

    model: str
    folder: Path
    sha256: dict[str, str]

    def copy_to(self, folder: Path) -> None:
        """Put those that are not there yet into a model folder. Raises ModelError and OutputError."""
        tree = files.tree_of(self.folder)
        for part in self.sha256:
            if (folder / part).is_dir():
                continue
            with files.output_errors(folder), files.whole_folder(folder / part) as temporary:
                for name in _files(self.folder / part):
                    files.copy_file(self.folder / part / name, temporary / name, tree)

    def told(self) -> dict[str, Any]:
        """What model.json says of them."""
        return {"model": self.model, "sha256": self.sha256}

    def option(self) -> str:
        """As it stands in the command."""
        return f" --parts-of {self.model}"


def parts_of(model: str | Path, parts: Sequence[str]) -> Taken:
    """Those of `parts` that a model has: a folder, or a shipped name. Raises ModelError where it has none of them."""
    folder = files.resolve_model(str(model))
    found = [part for part in parts if (folder / part / files.CONFIG_NAME).is_file()]
    if not found:
        raise ModelError(f"parts_of: {model} has no {' or '.join(f'{part}/' for part in parts)}; name a model that has")
    sums = {
        part: {name: files.sha256_file(folder / part / name, error=ModelError) for name in _files(folder / part)}
        for part in found
    }
    return Taken(str(model), folder, {part: files.sha256_value(found) for part, found in sums.items()})


def _files(folder: Path) -> list[str]:
    return [name for name in _NAMES if (folder / name).is_file()]
