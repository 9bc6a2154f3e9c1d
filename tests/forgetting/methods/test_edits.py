"""Methods in closed form: the edit is the optimum it says it is, and nothing else moves."""

import pytest
import torch
from tiny_text_models import tiny_pipeline

from pecker_fast.engine import LocalEngine, edit
from pecker_fast.forgetting.methods.uce import edited
from pecker_fast.loading.parts import load_parts
from pecker_fast.networks import aligned_tokens
from pecker_fast.networks.text_denoiser import TextTable
from pecker_fast.recipe import recipe_from

CAPTIONS = ["a red circle on the left", "a photo of the blue circle", "small circle", "a red square", "a white dog"]


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def model(request, tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("models") / request.param, request.param)


def began(model, **keys):
    given = {
        "model": str(model), "method": "uce", "forget": {"concept": "circle", "captions": CAPTIONS}, "cover": "square",
        "retain": ["a red square", "a blue triangle on the right", "green star", "a white dog"],
        "evaluate": {"final": 0, "teacher_steps": 2},
    }  # fmt: skip
    recipe = recipe_from({**given, **keys})
    parts = load_parts(recipe)
    engine = LocalEngine(recipe, parts.conditions, torch.device("cpu"))
    return recipe, parts, engine, engine.start(parts.teacher, parts.score, parts.generator)


SEVERAL = {
    "forget": [{"concept": "circle", "prompts": ["a {}", "the blue {}"]}, {"concept": "triangle", "prompts": ["a {}"]}],
    "cover": ["square", "small square"], "retain": ["a red square", "green star"],
}  # fmt: skip


@pytest.mark.parametrize(
    "keys", [{}, {"weights": {"retain": 3.0, "forget": 0.5}, "objective": {"ridge": 0.05}}, SEVERAL]
)
def test_the_new_weights_are_the_optimum(model, keys):
    recipe, parts, engine, state = began(model, **keys)
    edit(engine, state)
    old, new = dict(edited(state.teacher.unet)), dict(edited(state.generator.unet))
    assert old.keys() == new.keys()
    assert len(old) > 1
    table, c, w = state.teacher.table, parts.conditions, recipe.weights
    for name, layer in new.items():
        before = old[name].weight.double()
        after = layer.weight.detach().double().requires_grad_(True)
        assert not torch.equal(before, after)

        def gone(weight, before=before):
            total = 0.0
            for f, o in zip(c.forget, c.cover):
                asked, answered = (x.double() for x in aligned_tokens(table, f, o))
                total = total + w.forget / len(c.forget) * (asked @ weight.T - answered @ before.T).square().sum()
            for row in c.retain:
                asked = table.embeds[row].double()
                total = total + w.retain / len(c.retain) * (asked @ (weight - before).T).square().sum()
            return total + recipe.objective.ridge * (weight - before).square().sum()

        (slope,) = torch.autograd.grad(gone(after), after)
        (at_start,) = torch.autograd.grad(gone(start := before.clone().requires_grad_(True)), start)
        assert slope.norm() <= 1e-4 * at_start.norm(), name  # float32 weights round the optimum


def test_nothing_but_keys_and_values_moves(model):
    _, _, engine, state = began(model)
    edit(engine, state)
    moved = {f"{name}.weight" for name, _ in edited(state.generator.unet)}
    start = dict(state.teacher.named_parameters())
    for name, p in state.generator.named_parameters():
        assert torch.equal(p, start[name]) == (name not in moved), name


def test_tokens_stand_beside_those_of_the_other_word():
    ids = torch.tensor(
        [[0, 5, 7, 8, 6, 1, 1, 1], [0, 5, 9, 6, 1, 1, 1, 1], [0, 5, 9, 6, 1, 1, 1, 1], [0, 5, 6, 1, 1, 1, 1, 1]]
    )
    embeds = torch.arange(32.0).view(4, 8, 1)
    table = TextTable(("a", "b", "c", "d"), embeds, ids=ids)

    def beside(row, other):
        mine, theirs = aligned_tokens(table, row, other)
        assert torch.equal(mine, embeds[row])
        return [int(v) - 8 * other for v in theirs[:, 0]]

    assert beside(0, 1) == [0, 1, 2, 2, 3, 4, 5, 6]  # two tokens for one
    assert beside(1, 0) == [0, 1, 2, 4, 5, 6, 7, 7]  # one for two
    assert beside(1, 2) == list(range(8))


def test_relabel_copies_rows_and_moves_nothing_else(tiny_recipe):
    recipe = tiny_recipe(method="relabel", forget=[0, 1], cover=2, steps=0)
    parts = load_parts(recipe)
    engine = LocalEngine(recipe, parts.conditions, torch.device("cpu"))
    state = engine.start(parts.teacher, parts.score, parts.generator)
    edit(engine, state)
    start = dict(state.teacher.named_parameters())
    for name, p in state.generator.named_parameters():
        if name == "class_embedding.weight":
            assert torch.equal(p[:2], start[name][2].expand(2, -1))
            assert torch.equal(p[2:], start[name][2:])
        else:
            assert torch.equal(p, start[name])
