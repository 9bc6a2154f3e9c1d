"""The denoising interface over UNet2DConditionModel (Stable Diffusion 1.x, 2.x, XL): conditions are rows of a text table."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.networks.denoiser import Denoiser
from pecker_fast.networks.free import free_tokens, named_span, token_places
from pecker_fast.networks.latents import from_encoder, to_decoder
from pecker_fast.networks.schedule import Schedule

DECODED_PIXELS = 1 << 12  # latent pixels the VAE takes at a time: one latent of 64×64


@dataclass(frozen=True)
class TextTable:
    """Text embeddings of every prompt a run uses, made once: a condition is a row number.

    embeds [P, L, D]; pooled [P, D'] and time_ids [6] (original size, crop, target size) where the network wants them (SDXL).
    ids [P, L]: the tokens they are of, by the first tokenizer.
    """

    prompts: tuple[str, ...]
    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    ids: Tensor | None = None

    def index(self, prompts: Sequence[str]) -> tuple[int, ...]:
        """Rows of prompts that are in the table."""
        rows = {prompt: row for row, prompt in enumerate(self.prompts)}
        return tuple(rows[prompt] for prompt in prompts)

    def to(self, device: torch.device | str) -> TextTable:
        kinds = ("embeds", "pooled", "time_ids", "ids")
        moved = {key: t.to(device) for key in kinds if (t := getattr(self, key)) is not None}
        return replace(self, **moved)

    def rows(self, c: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """The network's own arguments for conditions c [N]."""
        given: dict[str, Any] = {"encoder_hidden_states": self.embeds[c].to(dtype)}
        if self.pooled is not None and self.time_ids is not None:
            time_ids = self.time_ids.expand(c.shape[0], -1)
            given["added_cond_kwargs"] = {"text_embeds": self.pooled[c].to(dtype), "time_ids": time_ids}
        return given


class TextDenoiser(Denoiser):
    """A UNet2DConditionModel on latents. Conditions are rows of `table`, int64 [N]; `null_class` is the row of the
    unconditional text. `vae` turns latents into images; all copies share it and the table.
    """

    def __init__(
        self,
        unet: nn.Module,
        schedule: Schedule,
        table: TextTable,
        vae: Any = None,
        null_class: int | None = None,
        latent_size: tuple[int, int] | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__(unet, schedule, null_class, channels_last)
        self.table = table
        self.vae = vae
        self.latent_size = latent_size  # (height, width); None = the size the network was trained on
        self.places: Tensor | None = None  # [P, L], where free tokens stand, see `with_places`
        self.tokens = 0  # free tokens of a vector

    @property
    def classes(self) -> list[int]:
        return [row for row in range(len(self.table.prompts)) if row != self.null_class]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        _, *size = super().sample_shape
        height, width = self.latent_size or size
        return int(self.config.in_channels), height, width

    def with_places(self, forget: Sequence[int], cover: Sequence[int], tokens: int) -> Self:
        """The same network, of whose prompts `tokens` tokens can be free ones: where forget[i] differs from cover[i], and before
        the end of prompts that are not forgotten. Raises ModelError where the prompts' tokens are not known."""
        ids = self.table.ids
        if ids is None:
            raise ModelError("the tokens of the prompts are not known, so no soft tokens can stand in their place")
        spans: list[tuple[int, int] | None] = [None] * len(self.table.prompts)
        for row, other_row in zip(forget, cover):
            spans[row] = named_span(ids[row], ids[other_row])
        other = copy.copy(self)
        other.tokens = tokens
        other.places = token_places(ids, spans, tokens).to(self.table.embeds.device)
        return other

    def free_codes(self, which: Tensor, c: Tensor) -> Tensor:
        return (which + 1) * len(self.table.prompts) + c

    @torch.no_grad()
    def own_vectors(self, c: Tensor) -> Tensor:
        """[N, k, D]: the prompts' embeddings at the places of the k free tokens (of several places of one, the first)."""
        assert self.places is not None
        found = torch.stack([(self.places[c] == j).int().argmax(1) for j in range(self.tokens)], 1)  # [N, k]
        return self.table.embeds[c.unsqueeze(1), found].float().clone()

    def to(self, device: torch.device | str) -> Self:
        other = super().to(device)
        other.table = self.table.to(device)
        other.places = None if self.places is None else self.places.to(device)
        if self.vae is not None:
            other.vae = self.vae.to(device)
        return other

    def beside(self) -> list[Tensor]:
        """The text table and the VAE."""
        table = [t for t in (self.table.embeds, self.table.pooled, self.table.time_ids) if t is not None]
        return table if self.vae is None else [*table, *self.vae.parameters()]

    def _forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        if self.channels_last:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        return self.unet(self.in_weights_dtype(x_t), t, **self._text(c), return_dict=False)[0]

    def _text(self, c: Tensor) -> dict[str, Any]:
        """The network's own arguments for conditions c [N], free ones among them."""
        if self.free is None:
            return self.table.rows(c, self.dtype)
        assert self.places is not None, "with_places comes before with_free"
        count = len(self.table.prompts)
        row, which = c % count, c // count - 1
        given = self.table.rows(row, self.dtype)
        states = given["encoder_hidden_states"]
        return given | {"encoder_hidden_states": free_tokens(states, self.free, self.places[row], which)}

    @torch.no_grad()
    def to_images(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1], float32, of latents [N, C, h, w]."""
        if self.vae is None:
            raise RecipeError("this network was loaded without a VAE; its latents cannot be shown")
        dtype = next(self.vae.parameters()).dtype
        scaled = to_decoder(x.to(dtype), self.vae_config)
        at_once = max(1, DECODED_PIXELS // (x.shape[2] * x.shape[3]))
        parts = [self.vae.decode(part, return_dict=False)[0] for part in scaled.split(at_once)]
        return torch.cat(parts).float().clamp(-1, 1)

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """Latents [N, C, h, w] (means of the VAE's posterior) of images [N, 3, H, W] in [-1, 1]."""
        assert self.vae is not None
        dtype = next(self.vae.parameters()).dtype
        _, height, width = self.sample_shape
        at_once = max(1, DECODED_PIXELS // (height * width))
        parts = [self.vae.encode(part.to(dtype)).latent_dist.mode() for part in images.split(at_once)]
        return from_encoder(torch.cat(parts).float(), self.vae_config)

    @property
    def vae_config(self) -> Any:
        assert self.vae is not None
        return self.vae.config
