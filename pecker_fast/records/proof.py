"""Whether what a run folder says of itself is so: one verifier, asked by every verb before it uses what lies there.

recipe.yaml, inputs.json and prompt files belong to the checkpoints and to pipeline/ by the hashes in their manifests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.errors import CheckpointError, PeckerError
from pecker_fast.loading import exported_manifest
from pecker_fast.recipe import Recipe, load_recipe
from pecker_fast.records.checkpoint import list_checkpoints
from pecker_fast.records.inputs import INPUTS, Inputs
from pecker_fast.records.manifest import read_manifest
from pecker_fast.records.run_folder import PIPELINE, RECIPE, is_as_marked, trajectory_sha256

Manifest = Mapping[str, Any]


def manifests(run_dir: Path) -> Iterator[tuple[Path, Manifest]]:
    """(file, content) of those that tell whose the run is: of pipeline/ and of the newest checkpoint whose manifest is sound.

    Damaged ones are told by whoever opens what they belong to.
    """
    sources = [(run_dir / PIPELINE, exported_manifest)]
    sources += [(folder, read_manifest) for folder in reversed(list_checkpoints(run_dir))]
    for folder, read in sources:
        try:
            found = read(folder)
        except PeckerError:
            continue
        if found is not None:
            yield folder / files.MANIFEST, found
        if found is not None and folder.name != PIPELINE:
            return


def check_run(run_dir: Path, recipe: Recipe, inputs: Inputs | None = None) -> None:
    """Raises CheckpointError where recipe.yaml, read as `recipe`, or inputs.json is not what the run was trained with."""
    path = run_dir / RECIPE
    if not is_as_marked(files.read_text(path)):
        raise CheckpointError(
            f"{path}: damaged or edited: it is not what its own sha256 was taken over; put the original back, or go on "
            "with `pecker-fast train`, which writes it anew"
        )
    mine = trajectory_sha256(recipe)
    for where, manifest in manifests(run_dir):
        if manifest.get("recipe_sha256") not in (None, mine):
            raise CheckpointError(
                f"{path}: not the recipe this run was trained with ({where} is of another); put the original back"
            )
        if inputs is not None and _base_of(manifest) not in (None, inputs.base_sha256):
            raise CheckpointError(
                f"{run_dir / INPUTS}: not what this run began with ({where} is of another base model); put the original back"
            )


def recipe_doubts(run_dir: Path) -> str | None:
    """Why recipe.yaml is not to be believed; None where nothing speaks against it."""
    try:
        text = files.read_text(run_dir / RECIPE)
        if not is_as_marked(text) or next(manifests(run_dir), None) is not None:
            check_run(run_dir, load_recipe(run_dir / RECIPE))
    except PeckerError as error:
        return str(error)
    return None


def known_base(run_dir: Path, inputs: Inputs | None) -> str | None:
    """`base_sha256` of the model that a run began with, from wherever it stands; None for runs of earlier versions."""
    if inputs is not None:
        return inputs.base_sha256
    return next((base for _, manifest in manifests(run_dir) if (base := _base_of(manifest)) is not None), None)


def known_start(run_dir: Path) -> str | None:
    """`start_sha256` of a run of an earlier version, which called it `base_sha256`; None for every other."""
    newest = next((found for path, found in manifests(run_dir) if path.parent.name != PIPELINE), {})
    return newest.get("base_sha256") if "start_sha256" not in newest else None


def check_prompts(run_dir: Path, prompts_sha256: str | None) -> None:
    """Raises CheckpointError where the prompts that were read are not those the run was trained with."""
    for where, manifest in manifests(run_dir):
        then = manifest.get("prompts_sha256")
        if then is not None and then != prompts_sha256:
            raise CheckpointError(
                f"{run_dir}: its prompts are not those it was trained with ({where}); put {INPUTS} and prompt files back"
            )


def _base_of(manifest: Manifest) -> str | None:
    """The hash of the base's UNet as its file has it; None in checkpoints of earlier versions."""
    is_checkpoint = "step" in manifest
    return manifest.get("base_sha256") if not is_checkpoint or "start_sha256" in manifest else None
