"""Free conditions: vectors in the place of class embeddings, soft tokens in the place of a concept's words."""

import pytest
import torch
from tiny_models import write_tiny_model

from pecker_fast.errors import ModelError
from pecker_fast.networks import TextTable, load_denoiser
from pecker_fast.networks.free import FIXED, named_span, token_places
from pecker_fast.networks.text_denoiser import TextDenoiser


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_denoiser(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def drawn(network, codes):
    x = torch.randn(len(codes), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return network.output(x, torch.full((len(codes),), 300), codes)


def test_a_vector_that_is_a_row_draws_what_the_row_draws(tiny):
    own = torch.tensor([0, 2, 1, 2])
    vectors = tiny.own_vectors(torch.tensor([2, 1]))
    free = tiny.with_free(vectors)
    codes = torch.tensor([0, *free.free_codes(torch.tensor([0, 1, 0]), own[1:]).tolist()])
    assert torch.equal(drawn(free, codes), drawn(tiny, torch.tensor([0, 2, 1, 2])))
    assert tiny.free is None  # the network it was made of is as it was
    assert torch.equal(drawn(free, own), drawn(tiny, own))


def test_gradients_reach_vectors_and_the_table_apart(tiny):
    network = tiny.clone()
    vectors = torch.randn(2, 32 if False else network.own_vectors(torch.tensor([0])).shape[1], requires_grad=True)
    free = network.with_free(vectors)
    codes = torch.cat([free.free_codes(torch.tensor([1]), torch.tensor([0])), torch.tensor([2])])
    table = network.unet.class_embedding.weight
    of_vectors, of_table = torch.autograd.grad(drawn(free, codes).sum(), [vectors, table])
    assert of_vectors[1].abs().sum() > 0
    assert of_vectors[0].abs().sum() == 0
    assert of_table[2].abs().sum() > 0
    assert of_table[[0, 1, 3]].abs().sum() == 0


def test_places_of_soft_tokens():
    # start, a, red, circle, end, padding; the cover has another word at 3
    ids = torch.tensor(
        [[9, 1, 2, 3, 8, 8, 8, 8], [9, 1, 2, 4, 8, 8, 8, 8], [9, 5, 5, 5, 2, 8, 8, 8], [9, 4, 2, 8, 8, 8, 8, 8]]
    )
    assert named_span(ids[0], ids[1]) == (3, 4)
    assert named_span(ids[2], ids[3]) == (1, 4)
    assert named_span(ids[0], ids[0]) is None
    places = token_places(ids, [(3, 4), None, (1, 4), None], 2)
    assert places[0].tolist() == [FIXED, FIXED, FIXED, 0, FIXED, FIXED, FIXED, 1]
    assert places[1].tolist() == [FIXED] * 6 + [1, 0]
    assert places[2].tolist() == [FIXED, 0, 1, 0, FIXED, FIXED, FIXED, FIXED]


def test_a_word_that_is_only_left_out_has_a_place_too():
    named, cover = torch.tensor([9, 1, 2, 3, 8, 8]), torch.tensor([9, 1, 3, 8, 8, 8])
    assert named_span(named, cover) == (2, 3)
    assert named_span(cover, named) == (1, 2)


def test_tokens_nobody_knows_are_refused():
    table = TextTable(("a", "b"), torch.zeros(2, 4, 8))
    network = TextDenoiser(torch.nn.Linear(1, 1), None, table)
    with pytest.raises(ModelError, match="tokens of the prompts are not known"):
        network.with_places([0], [1], 1)
