"""The real networks on the meta device: parameters and FLOPs are the published ones."""

import sys
from pathlib import Path

import pytest

from pecker_fast.errors import ModelError
from pecker_fast.networks.architectures import PREDICTION_TYPES, architecture, names

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from full_size import network_flops

GFLOP = 1e9


def test_every_architecture_has_a_unet_and_the_vaes_there_are():
    assert names() == ["sd15_unet", "sd15_vae", "sd21_unet", "sdxl_unet", "sdxl_vae"]
    assert {name.split("_")[0] for name in names()} == set(PREDICTION_TYPES)


def test_sd15_forward_and_parameters():
    found = network_flops(architecture("sd15_unet"), backward=False)
    assert round(found["parameters"] / 1e6, 1) == 859.5
    assert round(found["forward"] / GFLOP) == 803


def test_sd21_parameters():
    assert round(network_flops(architecture("sd21_unet"), backward=False)["parameters"] / 1e6, 1) == 865.9


def test_sdxl_parameters_and_vae():
    import torch

    from pecker_fast.account.memory.networks import build

    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in build(architecture(name)).parameters()) for name in names()}
    assert round(sizes["sdxl_unet"] / 1e6, 1) == 2567.5
    assert sizes["sd15_vae"] == sizes["sdxl_vae"]
    assert round(sizes["sd15_vae"] / 1e6, 1) == 83.7


@pytest.mark.slow
def test_backward_flops():
    sd15 = network_flops(architecture("sd15_unet"))
    assert [round(sd15[way] / GFLOP) for way in ("forward", "input_backward")] == [803, 923]
    assert sd15["backward"] / GFLOP == pytest.approx(1604, abs=1)  # 1603.5
    sdxl = network_flops(architecture("sdxl_unet"))
    assert [round(sdxl[way] / GFLOP) for way in ("forward", "backward", "input_backward")] == [6761, 13470, 7460]


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ModelError, match=r"'sd3_unet' is unknown \(one of sd15_unet,"):
        architecture("sd3_unet")
