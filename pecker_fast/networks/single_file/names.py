"""Names of the tensors of a Stable Diffusion model: diffusers' own against the original (CompVis, LDM) layout.

A plan is a list of `Entry`: which tensors of a diffusers module make one tensor of the original file, and how. Every
plan is derived from the names of the module at hand, so it holds for any number of blocks, layers and attentions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from pecker_fast import files
from pecker_fast.errors import ModelError

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP, OPEN_CLIP = "clip", "open_clip"
# kind → part → (prefix in the file, layout of the text encoder's names)
TEXT_ENCODERS = {
    "sd1": {"text_encoder": ("cond_stage_model.transformer.", CLIP)},
    "sd2": {"text_encoder": ("cond_stage_model.model.", OPEN_CLIP)},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.", CLIP),
        "text_encoder_2": ("conditioner.embedders.1.model.", OPEN_CLIP),
    },
}
# what other files are called, by a piece of a name that only they hold
_OTHERS = {
    "lora_": "a LoRA",
    "control_model.": "a ControlNet",
    "depth_model.": "a depth model",
    "conditioner.embedders.0.model.": "the SDXL refiner",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "motion_modules.": "AnimateDiff",
    "down_blocks.": "weights under diffusers' names (give their folder instead)",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


class Entry(NamedTuple):
    """One tensor of the original file and the tensors of the diffusers module that it is made of.

    change: "same" | "conv" ([C, C] as a 1×1 convolution [C, C, 1, 1]) | "join" (query, key, value along the first
    dimension) | "transpose".
    """

    original: str
    names: tuple[str, ...]
    change: str = "same"


def kind_of_single_file(keys: Iterable[str]) -> str:
    """ "sd1" | "sd2" | "sdxl" by the names of a file's tensors; raises ModelError naming what else it is."""
    keys = set(keys)

    def holds(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in keys)

    wrapper = next((piece for piece in ("module.", "_orig_mod.") if holds(piece)), None)
    if wrapper is not None:
        raise ModelError(f"single file: {files.named_after(wrapper)}")
    other = next((what for piece, what in _OTHERS.items() if any(piece in key for key in keys)), None)
    if other is None and holds(UNET_PREFIX):
        for kind, encoders in TEXT_ENCODERS.items():
            if all(holds(prefix) for prefix, _ in encoders.values()):
                if holds(VAE_PREFIX):
                    return kind
                other = f"a {kind} file without the image decoder ({VAE_PREFIX}*)"
        other = other or "a UNet without a text encoder that is known here"
    raise ModelError(
        f"single file: {other or 'tensors of an unknown model'} is not supported yet; "
        "a whole Stable Diffusion 1.x, 2.x or SDXL checkpoint was expected"
    )


def unet_plan(names: Iterable[str]) -> list[Entry]:
    """The plan of a UNet2DConditionModel from the names of its tensors; raises ModelError for a name without place."""
    names = list(names)
    down, up, mid = _layers(names, "down_blocks"), _layers(names, "up_blocks"), _layers(names, "mid_block")
    starts, start = {}, 1
    for block, (resnets, _, samplers) in sorted(down.items()):
        starts["down_blocks", block] = start
        start += resnets + samplers
    start = 0
    for block, (resnets, _, _) in sorted(up.items()):
        starts["up_blocks", block] = start
        start += resnets
    for resnets, attentions, _ in mid.values():
        if resnets != attentions + 1:
            raise ModelError("unet: the original layout has a middle block with one attention between two resnets")

    def original(name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        if module in _UNET_ENDS:
            return f"{_UNET_ENDS[module]}.{leaf}"
        found = re.fullmatch(
            r"(down_blocks|up_blocks|mid_block)(?:\.(\d{1,4}))?\.([a-z]+)\.(\d{1,4})\.(.+)\.(\w+)", name
        )
        if not found:
            return None
        side, block, what, layer, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
        if what not in ("resnets", "attentions", "downsamplers", "upsamplers"):
            return None
        if what == "resnets":
            rest = _RESNET.get(rest)
        if side == "mid_block":
            where = f"middle_block.{2 * layer + (what == 'attentions')}"
            return f"{where}.{rest}.{leaf}" if what in ("resnets", "attentions") and rest else None
        resnets, attentions, _ = (down if side == "down_blocks" else up)[block]
        blocks = "input_blocks" if side == "down_blocks" else "output_blocks"
        if what == "resnets" and rest:
            return f"{blocks}.{starts[side, block] + layer}.0.{rest}.{leaf}"
        if what == "attentions":
            return f"{blocks}.{starts[side, block] + layer}.1.{rest}.{leaf}"
        if (what, layer, rest) == ("downsamplers", 0, "conv"):
            return f"{blocks}.{starts[side, block] + resnets}.0.op.{leaf}"
        if (what, layer, rest) == ("upsamplers", 0, "conv"):
            return f"{blocks}.{starts[side, block] + resnets - 1}.{2 if attentions else 1}.conv.{leaf}"
        return None

    return _checked("unet", [(name, original(name), "same") for name in names], UNET_PREFIX)


def _layers(names: Iterable[str], side: str) -> dict[int, tuple[int, int, int]]:
    """Block → how many resnets, attentions and samplers it has."""
    found: dict[int, dict[str, set[str]]] = {}
    for name in names:
        match = re.match(rf"{side}(?:\.(\d{{1,4}}))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", name)
        if match:
            found.setdefault(int(match[1] or 0), {}).setdefault(match[2], set()).add(match[3])
    return {
        block: (
            len(what.get("resnets", ())),
            len(what.get("attentions", ())),
            len(what.get("downsamplers", ())) + len(what.get("upsamplers", ())),
        )
        for block, what in found.items()
    }


def vae_plan(names: Iterable[str]) -> list[Entry]:
    """The plan of an AutoencoderKL from the names of its tensors; raises ModelError for a name without place."""
    names = list(names)
    last = max(_layers([name.removeprefix("decoder.") for name in names], "up_blocks"), default=0)

    def original(name: str) -> tuple[str | None, str]:
        module, _, leaf = name.rpartition(".")
        coder, _, rest = module.partition(".")
        if module in ("quant_conv", "post_quant_conv") or rest in ("conv_in", "conv_out"):
            return name, "same"
        if rest == "conv_norm_out":
            return f"{coder}.norm_out.{leaf}", "same"
        if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)", rest):
            block = int(found[2]) if found[1] == "down" else last - int(found[2])
            return f"{coder}.{found[1]}.{block}.block.{found[3]}.{_shortcut(found[4])}.{leaf}", "same"
        if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv", rest):
            block = int(found[2]) if found[1] == "down" else last - int(found[2])
            return f"{coder}.{found[1]}.{block}.{found[3]}sample.conv.{leaf}", "same"
        if found := re.fullmatch(r"mid_block\.resnets\.([01])\.(\w+)", rest):
            return f"{coder}.mid.block_{int(found[1]) + 1}.{_shortcut(found[2])}.{leaf}", "same"
        if (found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", rest)) and found[1] in _VAE_ATTENTION:
            change = "conv" if leaf == "weight" and found[1] != "group_norm" else "same"
            return f"{coder}.mid.attn_1.{_VAE_ATTENTION[found[1]]}.{leaf}", change
        return None, "same"

    return _checked("vae", [(name, *original(name)) for name in names], VAE_PREFIX)


def _shortcut(name: str) -> str:
    return "nin_shortcut" if name == "conv_shortcut" else name


def text_plan(part: str, kind: str, names: Iterable[str]) -> list[Entry]:
    """The plan of one text encoder of a `kind` from its names (each as `text_model.…` or `text_projection.weight`)."""
    prefix, layout = TEXT_ENCODERS[kind][part]
    if layout == CLIP:
        return _checked(part, [(name, name, "same") for name in names], prefix)
    entries: list[tuple[str, str | None, str]] = []
    joined: dict[str, tuple[str, ...]] = {}
    for name in names:
        found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in _OPEN_CLIP_ENDS:
            entries.append((name, _OPEN_CLIP_ENDS[name], "same"))
        elif name == "text_projection.weight":
            entries.append((name, "text_projection", "transpose"))
        elif found and found[2] in _OPEN_CLIP_LAYER:
            target = f"transformer.resblocks.{found[1]}.{_OPEN_CLIP_LAYER[found[2]]}.{found[3]}"
            entries.append((name, target, "same"))
        elif found and found[2] in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            target = f"{prefix}transformer.resblocks.{found[1]}.attn.in_proj_{found[3]}"
            stem = f"text_model.encoder.layers.{found[1]}.self_attn"
            joined[target] = tuple(f"{stem}.{which}_proj.{found[3]}" for which in "qkv")
        else:
            entries.append((name, None, "same"))
    return _checked(part, entries, prefix) + [Entry(target, parts, "join") for target, parts in joined.items()]


def _checked(part: str, found: list[tuple[str, str | None, str]], prefix: str) -> list[Entry]:
    lost = [name for name, original, _ in found if original is None]
    if lost:
        raise ModelError(f"{part}: {lost[0]} has no place in the original layout ({len(lost)} tensors in all)")
    entries = [Entry(f"{prefix}{original}", (name,), change) for name, original, change in found]
    if len({entry.original for entry in entries}) < len(entries):
        raise ModelError(f"{part}: two of its tensors would share a name in the original layout")
    return entries
