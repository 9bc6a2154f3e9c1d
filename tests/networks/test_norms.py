"""Norms that take the activation behind them over: the same function, the same names, and what cannot be fused stays."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from pecker_kernels import native
from tiny_models import write_tiny_model
from tiny_text_models import tiny_pipeline
from torch import nn

from pecker_fast.errors import RecipeError
from pecker_fast.loading import load_model, load_parts
from pecker_fast.networks import fuse_norms, load_unet
from pecker_fast.networks.norms import Activated, NormSiLU
from pecker_fast.recipe import recipe_from
from pecker_fast.runs import train


def fused_in(network):
    return [name for name, module in network.named_modules() if isinstance(module, NormSiLU)]


@pytest.fixture(scope="module", params=["classes", "sd1", "sdxl"])
def pair(request, tmp_path_factory):
    """(network, the same fused, how it is called)."""
    folder = tmp_path_factory.mktemp("norms") / request.param
    if request.param == "classes":
        network, call = load_unet(write_tiny_model(folder) / "unet"), {"class_labels": torch.tensor([0, 2])}
    else:
        network = load_unet(tiny_pipeline(folder, request.param) / "unet")
        call = {"encoder_hidden_states": torch.randn(2, 5, network.config.cross_attention_dim)}
        if request.param == "sdxl":
            pooled = network.config.projection_class_embeddings_input_dim - 6 * network.config.addition_time_embed_dim
            call["added_cond_kwargs"] = {"text_embeds": torch.randn(2, pooled), "time_ids": torch.ones(2, 6)}
    return network, fuse_norms(copy.deepcopy(network)), call


def test_the_same_function_of_the_same_parameters(pair):
    plain, fused, call = pair
    norms = fused_in(fused)
    blocks = [name for name, module in plain.named_modules() if type(module).__name__ == "ResnetBlock2D"]
    assert sorted(norms) == sorted([*(f"{b}.norm{i}" for b in blocks for i in (1, 2)), "conv_norm_out"])
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert fused.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, plain.config.in_channels, 8, 8)
    found = []
    for network in (plain, fused, copy.deepcopy(fused)):
        leaf = x.clone().requires_grad_()
        y = network(leaf, torch.tensor([100, 600]), return_dict=False, **call)[0]
        grads = torch.autograd.grad(y.square().sum(), [leaf, *network.parameters()], allow_unused=True)
        found.append([y, *(g for g in grads if g is not None)])
    assert len(found[0]) == len(found[1])
    for a, b, c in zip(*found):
        largest, off = float(a.detach().abs().max()), float((a - b).detach().abs().max())
        assert off <= 2e-4 * largest + 1e-6, (off, largest)
        assert torch.equal(b, c)


def test_it_is_the_kernel_that_runs(pair, monkeypatch):
    from pecker_kernels.norm import cpu

    _, fused, call = pair
    calls = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args: calls.append(args[5]) or forward(*args))
    fused(torch.randn(2, fused.config.in_channels, 8, 8), 5, **call)
    assert calls == [True] * len(fused_in(fused))


def test_one_tensor_less_is_kept_for_the_way_back(pair):
    plain, fused, call = pair
    kept = []
    for network in (plain, fused):
        weights, sizes = {p.data_ptr() for p in network.parameters()}, {}

        def keep(t, weights=weights, sizes=sizes):
            if t.data_ptr() not in weights:
                sizes[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            network(torch.randn(2, network.config.in_channels, 8, 8), 5, **call)
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.95 * kept[0]


def test_what_is_no_norm_with_its_activation_stays():
    shape = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    scaled = fuse_norms(UNet2DModel(**shape, **kinds, resnet_time_scale_shift="scale_shift"))
    assert fused_in(scaled) == ["conv_norm_out"]
    other = fuse_norms(UNet2DModel(**shape, **kinds, act_fn="mish"))
    assert fused_in(other) == ["conv_norm_out"]
    assert type(fuse_norms(nn.Linear(2, 2))) is nn.Linear
    once = UNet2DModel(**shape, **kinds)
    twice = fuse_norms(fuse_norms(once))
    assert sum(isinstance(module, Activated) for module in twice.modules()) == len(fused_in(twice)) // 2 + 1


def test_every_network_of_a_run_has_them(tiny_recipe):
    recipe = tiny_recipe(engine={"norms": "fused"})
    parts = load_parts(recipe)
    for network in (parts.teacher, parts.score, parts.generator):
        assert fused_in(network.unet)
    assert not fused_in(load_model(tiny_recipe()).teacher.unet)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"engine": {"norms": "fused", "compile": "blocks"}}, "engine.norms: engine.compile fuses norms itself"),
        ({"engine": {"norms": "fused"}, "precision": "bf16"}, "engine.norms: on a CPU fused norms are of float32"),
    ],
)
def test_what_they_do_not_go_with_is_refused(tiny_recipe, keys, line):
    with pytest.raises(RecipeError, match=line):
        load_model(tiny_recipe(**keys))
    with pytest.raises(RecipeError, match=r"engine\.norms: expected"):
        recipe_from({"engine": {"norms": "both"}})


def test_without_the_compiled_kernels_they_are_refused(tiny_recipe, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.raises(RecipeError, match=r"engine\.norms: the compiled kernels are not installed"):
        load_model(tiny_recipe(engine={"norms": "fused"}))


def test_a_run_cut_in_two_is_the_whole_run(tiny_recipe, tmp_path):
    keys = {
        "engine": {"norms": "fused"},
        "mask": {"samples": 8},
        "evaluate": {"every": 0, "final": 0},
        "checkpoint": {"every": 1},
    }
    whole = train(tiny_recipe(**keys, steps=3, output=str(tmp_path / "whole")), quiet=True)
    train(tiny_recipe(**keys, steps=2, output=str(tmp_path / "cut")), quiet=True)
    cut = train(tiny_recipe(**keys, steps=3, output=str(tmp_path / "cut")), quiet=True)
    name = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (whole.run_dir / name).read_bytes() == (cut.run_dir / name).read_bytes()
