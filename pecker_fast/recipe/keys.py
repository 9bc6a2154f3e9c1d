"""The keys as a table, and which of them do nothing in a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pecker_fast.recipe.errors import fields_of, section_type
from pecker_fast.recipe.load import recipe_from, recipe_to_dict
from pecker_fast.recipe.schema import Recipe
from pecker_fast.recipe.sections import Adversary, Images


def idle_keys(recipe: Recipe) -> list[str]:
    """Keys set to something else than their default that do nothing in this recipe, one line each with the reason."""
    random = ("score", "contrast", "reduction", "samples", "data", "timesteps", "threshold")
    attacks = [key for key in Adversary.model_fields if key != "conditions"]
    rules: list[tuple[bool, str, tuple[str, ...]]] = [
        (
            not recipe.facts.masked,
            f"method={recipe.method}",
            ("mask.source", "mask.density", "mask.structure", "mask.only", "mask.exclude", "update_rule"),
        ),
        (
            recipe.facts.masked and recipe.mask.source == "none",
            "mask.source=none",
            ("mask.density", "mask.only", "mask.exclude", "update_rule"),
        ),
        (
            not recipe.one_step,
            f"method={recipe.method}",
            (
                "alpha",
                "timesteps.init",
                "lr.score",
                "weights.score_retain",
                "weights.score_forget",
                "guidance.score",
                "guidance.score_train",
                "guidance.text_dropout",
            ),
        ),
        (recipe.one_step, f"method={recipe.method}", tuple(f"images.{key}" for key in Images.model_fields)),
        (
            recipe.images.source == "trajectory",
            "images.source=trajectory",
            ("images.samples",),
        ),
        *(
            (method != recipe.method, f"method={recipe.method}", (f"objective.{key}",))
            for key, method in {"eta": "esd", "ewc": "sa", "ridge": "uce", "crucial": "spare"}.items()
        ),
        (recipe.adversary.conditions == 0, "adversary.conditions=0", tuple(f"adversary.{key}" for key in attacks)),
        (recipe.steps == 0, "steps=0", ("adversary.conditions",)),
        (recipe.adversary.conditions > 0 and not recipe.uses_prompts, "classes to forget", ("adversary.tokens",)),
        (recipe.mask.source == "random", "mask.source=random", tuple(f"mask.{key}" for key in random)),
        (recipe.mask.source != "random" and recipe.mask.threshold is not None, "mask.threshold", ("mask.density",)),
        (recipe.mask.score == "forget_loss", "mask.score=forget_loss", ("mask.data", "mask.timesteps")),
        (recipe.mask.structure != "tile", f"mask.structure={recipe.mask.structure}", ("mask.tile",)),
        (
            recipe.engine.zero == 0,
            "engine.zero=0",
            tuple(f"engine.{k}" for k in ("stall_s", "offload", "deepspeed", "shard_teacher")),
        ),
        ("lora" not in (recipe.score, recipe.student), "score=full and student=full", ("lora.rank", "lora.targets")),
        (recipe.uses_prompts, "prompts to forget", ("null_class",)),
        (not recipe.uses_prompts, "classes to forget", ("resolution", "guidance.unconditional", "evaluate.prompts")),
    ]
    values, defaults = _flat(recipe), _flat(recipe_from({"method": recipe.method}))
    return [
        f"{key} has no effect with {cause}"
        for applies, cause, keys in rules
        if applies
        for key in keys
        if values[key] != defaults[key]
    ]


def _flat(recipe: Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe_to_dict(recipe).items():
        flat |= {f"{key}.{sub}": item for sub, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def recipe_help() -> list[tuple[str, str, Any, str]]:
    """(dotted key, type, default, help) of every key that holds a value, in the documented order."""
    rows = []
    for key, field in fields_of(Recipe).items():
        if section_type(field) is None:
            rows.append((key, _type_text(field.annotation), field.default, field.description or ""))
    return rows


def _type_text(kind: Any) -> str:
    words = {int: "integer", float: "number", bool: "true | false", str: "text", type(None): "null", dict: "mapping"}
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin is list:
        return f"list of {_type_text(inner[0])}"
    if origin is Annotated:
        return _type_text(inner[0])
    if inner and origin is not dict:
        return " | ".join(_type_text(one) for one in inner)
    return words.get(origin or kind, str(kind))
