"""The least recipe of a text-to-image model for methods that leave a model of many steps."""

from pecker_fast.recipe import recipe_from

SMALL = {"steps": 4, "batch_size": 4, "images": {"samples": 6, "steps": 3}, "mask": {"samples": 8}}
CAPTIONS = ["a red circle on the left", "a photo of the blue circle", "small circle", "a red square", "a white dog"]


def text_recipe(model, output, **keys):
    given = {
        "model": str(model), "forget": {"concept": "circle", "captions": CAPTIONS}, "cover": "square",
        "retain": ["a red square", "a blue triangle on the right", "green star", "a white dog"],
        "evaluate": {"every": 0, "final": 0, "teacher_steps": 2}, "output": str(output), **SMALL,
    }  # fmt: skip
    for key, value in keys.items():
        given[key] = {**given[key], **value} if isinstance(value, dict) and isinstance(given.get(key), dict) else value
    return recipe_from(given)
