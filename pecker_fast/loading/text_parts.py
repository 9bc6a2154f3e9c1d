"""What a text-to-image recipe names: prompts, text table, networks, the captions it is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pecker_fast import files
from pecker_fast.conditions import Conditions, PromptPlan, inlined, inlined_captions, notes_of, plan_prompts
from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.networks import PromptWindow, TextDenoiser, copy_part, save_part, text_model
from pecker_fast.networks.single_file import load_single_file, unet_map, unet_of
from pecker_fast.recipe import RECIPES, Recipe

COPIED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class TextParts:
    """The text side of a run. `source`: the model's folder or single file; `configs`: the folder of its tokenizer."""

    source: Path
    configs: Path
    plan: PromptPlan
    judged: Conditions  # rows of the table that the model is judged by: forget with their covers, and retain
    pixels: tuple[int, int]  # (height, width) of the images
    window: PromptWindow  # what the text encoders read of all prompts

    def check_prompts(self) -> None:
        """Raises RecipeError where a prompt to forget reads to the model as its cover, or as a caption to keep."""
        self.window.check(self.plan.forget, self.plan.cover, self.plan.retain)

    def notes(self) -> list[str]:
        """What the user is told of captions and prompts before training."""
        plan = self.plan
        return [*notes_of(plan), *self.window.notes((*plan.forget, *plan.cover, *plan.retain, plan.unconditional))]

    @property
    def prompts_sha256(self) -> str:
        """Of what is forgotten, drawn in its place and kept, in words."""
        plan = self.plan
        return files.sha256_value([plan.forget, plan.cover, plan.retain, plan.unconditional, plan.concepts])

    @property
    def single(self) -> bool:
        """Whether the model is a single file."""
        return self.source.is_file()

    def base_unet(self) -> dict[str, Tensor]:
        """The UNet's tensors as the base's file has them, by diffusers' names."""
        if not self.single:
            return files.read_weights(self.source / "unet")
        names = unet_map(files.read_config(self.configs / "unet" / files.CONFIG_NAME, "UNet2DConditionModel"))
        return unet_of(files.read_tensors(self.source, error=ModelError)[0], names, self.source)

    def write_other_parts(self, folder: Path) -> None:
        """The base's VAE, text encoders and tokenizers into a diffusers folder, every bit kept. Raises OutputError."""
        modules = load_single_file(self.source, self.configs) if self.single else {}
        for part in COPIED:
            if part in modules:
                save_part(modules[part], folder / part)
            elif (self.configs / part).is_dir():
                copy_part(self.configs / part, folder / part)


def prompt_folders(model: Path | None) -> list[Path]:
    """Where prompt files are looked for beside the working directory: the shipped recipes' folder, and the model's."""
    return [RECIPES, *([model] if model is not None and model.is_dir() else [])]


def plan_of(recipe: Recipe, model: Path | None) -> tuple[PromptPlan, PromptPlan]:
    """The prompts of a recipe: to train with, and to judge by. Raises RecipeError."""
    folders = prompt_folders(model)
    plan = plan_prompts(
        recipe.forget, recipe.cover, recipe.retain, folders=folders, unconditional=recipe.guidance.unconditional
    )
    captions = recipe.evaluate.prompts
    if captions is None:
        return plan, plan
    if not plan.concepts:
        raise RecipeError(
            "evaluate.prompts: captions are sorted by forget.concept, which this recipe has not; leave it out"
        )
    concepts = [{"concept": concept, "captions": captions} for concept, _ in plan.concepts]
    try:
        judged = plan_prompts(concepts, [cover for _, cover in plan.concepts], captions, folders=folders)
    except RecipeError as error:
        raise RecipeError(f"evaluate.prompts: {error}") from None
    return plan, judged


def inlined_prompts(recipe: Recipe, model: Path | None = None) -> dict[str, Any]:
    """By key, what the recipe says of prompts without a file in it. model: its folder; None = where its name is a local one.

    Raises RecipeError for a file that cannot be read.
    """
    folders = prompt_folders(model or _configs_at_hand(recipe))
    forget, cover, retain = inlined(recipe.forget, recipe.cover, recipe.retain, folders)
    captions = inlined_captions("evaluate.prompts", recipe.evaluate.prompts, folders)
    return {"forget": forget, "cover": cover, "retain": retain, "evaluate.prompts": captions}


def _configs_at_hand(recipe: Recipe) -> Path | None:
    """The model's folder, without asking a network; None where there is none."""
    name = recipe.config_folder or recipe.model
    return files.resolve_model(name) if name in files.shipped_models() or Path(name).exists() else None


def load_text_parts(
    recipe: Recipe, source: Path, more: Sequence[str] = ()
) -> tuple[TextDenoiser, Conditions, TextParts]:
    """(teacher φ, conditions, the rest) on the CPU. more: further prompts of the table.

    Raises RecipeError or ModelError; prompts are looked at first.
    """
    configs = config_folder(recipe, source)
    plan, judged = plan_of(recipe, configs)
    groups: list[tuple[str, ...]] = [(plan.unconditional,)]
    groups += [group for one in (plan, judged) for group in (one.forget, one.cover, one.retain)]
    prompts = text_model.unique(*groups, more)
    window = text_model.prompt_window(configs, prompts)
    encoders = None
    if source.is_file():
        text_model.check_text_folder(configs)
        encoders = load_single_file(source, configs)
        networks = text_model.networks_of(encoders, configs)
    else:
        networks = text_model.load_networks(source)
    latents = text_model.latent_size(networks, recipe.resolution, str(source))
    size = text_model.pixel_size(networks, latents)
    table = text_model.encode_prompts(configs, prompts, plan.unconditional, size, encoders)
    text_model.check_fit(networks, table, source)
    teacher = text_model.text_denoiser(networks, table, plan.unconditional, latents, recipe.engine.channels_last)

    def conditions(given: PromptPlan) -> Conditions:
        forget, cover, retain = (table.index(group) for group in (given.forget, given.cover, given.retain))
        return Conditions(forget, cover, retain, tuple(dict.fromkeys((*forget, *retain))))

    return teacher, conditions(plan), TextParts(source, configs, plan, conditions(judged), size, window)


def config_folder(recipe: Recipe, source: Path) -> Path:
    """The diffusers folder with configs and tokenizer: the model itself, or `model_config` of a single file."""
    if not source.is_file():
        if recipe.config_folder is not None:
            raise RecipeError("model_config: is for single files; this model is a folder with its own configs")
        return source
    if recipe.config_folder is None:
        raise ModelError(
            f"{source}: a single file holds neither configs nor a tokenizer; give model_config=FOLDER, a diffusers folder of "
            "the same kind of model (its weights are not needed)"
        )
    folder = files.resolve_model(recipe.config_folder)
    if not folder.is_dir() or not text_model.is_text_model(folder):
        raise ModelError(
            f"model_config: {folder} is no diffusers folder of a Stable Diffusion model (model_index.json)"
        )
    return folder
