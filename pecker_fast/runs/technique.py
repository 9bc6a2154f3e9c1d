"""A run as a technique of the package eval-unlearn (entry point `eval_unlearn.techniques`), for its metrics and data sets.

What is drawn is what stock diffusers draws from the run's `pipeline/`; nothing of the package is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pecker_fast.errors import RecipeError
from pecker_fast.loading import pick_device
from pecker_fast.runs.held import load_run


class PeckerFastTechnique:
    """`run`: a run folder of a text-to-image model. device: None = a GPU where there is one.

    num_inference_steps, guidance_scale: of results of many steps; None = the recipe's. A one-step result takes neither.
    Raises OutputError or ModelError for a folder that is no whole run, RecipeError for a run that draws from classes.
    """

    def __init__(
        self,
        run: str = "",
        device: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        if not run:
            raise RecipeError("run: give the run folder, as {technique: pecker_fast, run: runs/celebrity}")
        from diffusers import DiffusionPipeline

        opened = load_run(Path(run))
        recipe = opened.recipe
        if not recipe.uses_prompts:
            raise RecipeError(f"{run}: this run's model draws from classes; eval-unlearn asks with prompts")
        self.device = device or str(pick_device())
        self.pipe: Any = DiffusionPipeline.from_pretrained(
            opened.pipeline, local_files_only=True, use_safetensors=True
        ).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.options: dict[str, Any]
        if recipe.one_step:
            self.options = {"num_inference_steps": 1, "timesteps": [recipe.timesteps.init], "guidance_scale": 1.0}
        else:
            self.options = {
                "num_inference_steps": num_inference_steps or recipe.evaluate.teacher_steps,
                "guidance_scale": recipe.guidance.teacher if guidance_scale is None else guidance_scale,
            }
        self.one_step = recipe.one_step

    def generate(self, prompts: Sequence[str], seed: int | None = None, **keys: Any) -> list[Any]:
        """A PIL image for each prompt; the noise of prompt i is a function of seed + i. keys: of the pipeline's call; what would
        make a one-step result take other steps is left out."""
        if self.one_step:
            keys = {key: value for key, value in keys.items() if key not in self.options}
        images = []
        for i, prompt in enumerate(prompts):
            noise = None if seed is None else torch.Generator(device=self.device).manual_seed(seed + i)
            images.append(self.pipe(prompt=prompt, generator=noise, **{**self.options, **keys}).images[0])
        return images
