"""Gradient checkpointing passes forward again on the way back: under whatever the pass itself ran in, and to the same numbers."""

import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError

sys.path.insert(0, str(Path(__file__).parents[1] / "account"))

from test_memory import TEXT

from pecker_fast.account.memory import predict
from pecker_fast.engine import LocalEngine
from pecker_fast.forgetting import SaliencyPass
from pecker_fast.loading.parts import enable_checkpointing
from pecker_fast.recipe import load_recipe

LOSS = {"mask": {"score": "forget_loss", "density": 0.3, "structure": "row"}, "update_rule": "salient_only"}
CASES = {
    "forgetting loss": LOSS,
    "bf16": {**LOSS, "precision": "bf16"},
    "adapters in bf16": {**LOSS, "precision": "bf16", "score": "lora", "engine": {"weights": "bf16"}},
    "contrast": {**LOSS, "mask": {**LOSS["mask"], "contrast": True}},
}


def one_iteration(setup, keys, checkpointing):
    """(bits of the mask, θ after a step)."""
    _, engine, state, _ = setup(None, structure="row", **keys)
    if checkpointing:
        for network in (state.teacher, state.score, state.generator):
            enable_checkpointing(network.unet)
    mask = engine.make_mask(state)
    engine.follow(state, mask)
    engine.score_step(state)
    engine.generator_step(state)
    return mask, [p.detach().clone() for _, p in state.generator.named_parameters()]


@pytest.mark.some(3)
@pytest.mark.parametrize("case", CASES)
def test_an_iteration_is_the_same_with_and_without(setup, case):
    plain, weights = one_iteration(setup, CASES[case], False)
    mask, same = one_iteration(setup, CASES[case], True)
    assert mask == plain
    assert all(torch.equal(a, b) for a, b in zip(weights, same))


def test_the_gate_fails_where_the_score_network_is_thawed_before_the_way_back(setup, monkeypatch):
    loss = SaliencyPass.loss

    def thawed(self, *args):
        with self.score.frozen():
            return loss(self, *args)

    monkeypatch.setattr(SaliencyPass, "passing", lambda self: nullcontext())
    monkeypatch.setattr(SaliencyPass, "loss", thawed)
    with pytest.raises(CheckpointError):
        one_iteration(setup, LOSS, True)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_memory_is_predicted_with_it_in_bfloat16(device):
    keys = ["batch_size=2", "method=sfd", "ema=0", "precision=bf16"]
    plain, small = (
        predict(load_recipe(None, [*keys, f"engine.checkpointing={on}"]), TEXT, device=device)
        for on in ("false", "true")
    )
    assert small.phases["score step"] < 0.9 * plain.phases["score step"]


@pytest.mark.slow
def test_memory_of_a_saliency_pass_is_predicted_with_it():
    keys = ["batch_size=2", "mask.score=forget_loss", "precision=bf16"]
    plain, small = (predict(load_recipe(None, [*keys, f"engine.checkpointing={on}"]), TEXT) for on in ("false", "true"))
    assert small.phases["saliency pass"] < plain.phases["saliency pass"]


def test_the_gate_fails_where_attention_is_chosen_for_the_pass_forward_alone(monkeypatch):
    def autocast(self):
        stack = ExitStack()
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack

    monkeypatch.setattr(LocalEngine, "autocast", autocast)
    monkeypatch.setattr(LocalEngine, "attention", lambda self: nullcontext())
    keys = ["batch_size=2", "method=sfd", "precision=bf16", "engine.checkpointing=true"]
    with pytest.raises(CheckpointError):
        predict(load_recipe(None, keys), TEXT)
