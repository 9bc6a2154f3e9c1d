"""`mask.exclude`: tensors that are in no mask, whatever chooses it; the density stays that of all weights."""

import pytest
import torch

from pecker_fast.errors import RecipeError
from pecker_fast.forgetting.excluded import check_exclude

OUT = "class_embedding.weight"


@pytest.mark.parametrize(
    "mask",
    [
        {"source": "saliency"},
        {"source": "random"},
        {"source": "saliency", "structure": "row", "contrast": True},
        {"source": "random", "scope": "tensor"},
    ],
    ids=lambda mask: "-".join(map(str, mask.values())),
)
def test_nothing_of_an_excluded_tensor_is_in_the_mask(setup, mask):
    _, engine, state, _ = setup(mask={**mask, "density": 0.3})
    free = engine.make_mask(state)
    assert free.count_of(OUT) > 0
    _, engine, state, _ = setup(mask={**mask, "density": 0.3, "exclude": ["class_embed*"]})
    found = engine.make_mask(state)
    assert found.names == free.names
    assert found.count_of(OUT) == 0
    if mask.get("structure", "element") == "element" and "scope" not in mask:
        assert found.count == free.count == round(0.3 * free.total)
    elif "scope" in mask:
        assert {n: found.count_of(n) for n in found.names if n != OUT} == {
            n: free.count_of(n) for n in free.names if n != OUT
        }
    found.check(state.generator.named_parameters())


def test_all_but_the_excluded_is_chosen_as_ever(setup):
    _, engine, state, _ = setup(mask={"threshold": 1e-4})
    free = engine.make_mask(state)
    _, engine, state, _ = setup(mask={"threshold": 1e-4, "exclude": [OUT]})
    found = engine.make_mask(state)
    assert all(torch.equal(found.bits[n], free.bits[n]) for n in found.names if n != OUT)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"exclude": ["class_embeding.*"]}, "'class_embeding.*' is no tensor of this model; did you mean class_embedding."),
        ({"exclude": ["zzz"]}, "mask.exclude: 'zzz' is no tensor of this model; `pecker-fast mask RUN` lists the tensors"),
        ({"exclude": ["*"]}, "mask.exclude: leaves no tensor for the mask"),
        ({"exclude": ["*"], "threshold": 1.0}, "mask.exclude: leaves no tensor for the mask"),
        ({"exclude": ["*weight"], "density": 0.9}, "mask.density: 0.9 of all weights is more than mask.exclude leaves"),
    ],
)  # fmt: skip
def test_refused_before_anything_runs(setup, mask, message):
    recipe, _, state, _ = setup(mask=mask)
    with pytest.raises(RecipeError) as caught:
        check_exclude(recipe, state.generator)
    assert message in str(caught.value)
