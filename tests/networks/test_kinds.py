"""Networks that want something else than is given them are refused in one line, before or by a pass without memory."""

import json
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from tiny_models import write_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_text_models import tiny_pipeline

from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.networks import is_text_model, load_denoiser, text_model
from pecker_fast.networks.latents import from_encoder, to_decoder
from pecker_fast.networks.single_file import load_single_file, to_single_file
from pecker_fast.networks.trial import trial_pass


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_pipeline(folder / kind, kind) for kind in ("sd1", "sdxl")}


@pytest.fixture
def copy(models, tmp_path):
    """copy(kind) -> a folder of one's own."""
    return lambda kind: Path(shutil.copytree(models[kind], tmp_path / kind))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CLASS_UNETS = [
    ({"class_embed_type": "identity"}, "class_embed_type 'identity' is not supported"),
    ({"class_embed_type": "timestep"}, "class_embed_type 'timestep' is not supported"),
    ({"class_embed_type": "simple_projection"}, "class_embed_type is 'simple_projection'; expected one of"),
    ({"sample_size": None}, "sample_size is missing.*write it into the config"),
    ({"out_channels": 2}, "predicts variances too"),
    ({"out_channels": 3}, "as many output as input channels"),
    ({"time_embedding_type": "fourier"}, "noise levels, not timesteps"),
    ({"time_embedding_type": "learned", "num_train_timesteps": 40}, "40 is less than the 1000 timesteps"),
]


@pytest.mark.parametrize(("changes", "match"), CLASS_UNETS)
def test_class_unets_of_other_kinds_are_refused_by_the_key(tmp_path, changes, match):
    folder = write_tiny_model(tmp_path / "model", judge=False)
    edit(folder / "unet" / "config.json", **changes)
    with pytest.raises(ModelError, match=match):
        load_denoiser(folder)


@pytest.mark.parametrize("size", [9, [8, 9], "8", -8, 10**12])
def test_a_size_that_the_unet_cannot_halve_is_found_by_the_trial_pass(tmp_path, size):
    folder = write_tiny_model(tmp_path / "model", judge=False)
    edit(folder / "unet" / "config.json", sample_size=size)
    runs = size in (9, [8, 9])  # the others are no sizes at all, and are found before
    match = "its config makes a UNet2DModel that cannot run" if runs else "sample_size is .*; expected a whole number"
    with pytest.raises(ModelError, match=match):
        load_denoiser(folder)


def test_the_trial_pass_lets_sound_networks_through(models):
    for folder, kind in ((models["sd1"], "sd1"), (models["sdxl"], "sdxl")):
        for part, name in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
            config = json.loads((folder / part / "config.json").read_text())
            with torch.device("meta"):
                trial_pass(getattr(diffusers, name).from_config(config), f"{kind} {part}")


def test_null_class_of_the_recipe_comes_before_that_of_the_folder(tmp_path):
    folder = write_tiny_model(tmp_path / "model", judge=False)
    assert load_denoiser(folder).null_class == 3
    assert load_denoiser(folder, 0).classes == [1, 2, 3]
    with pytest.raises(RecipeError, match=r"null_class: 4 is out of range.* 0 to 3"):
        load_denoiser(folder, 4)
    (folder / "model.json").write_text(json.dumps({"null_class": "3"}))
    with pytest.raises(ModelError, match=r"model.json: null_class is '3'; expected a whole number"):
        load_denoiser(folder)


TEXT_PARTS = [
    (
        "unet",
        {"in_channels": 9},
        "takes 9 channels .* an inpainting model; inpainting and depth models are not supported",
    ),
    ("unet", {"in_channels": 5}, "a depth model; inpainting and depth models are not supported"),
    ("unet", {"in_channels": 7}, "an upscaler"),
    ("unet", {"out_channels": 8}, "takes 4 channels and gives 8"),
    ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256 is not supported.*distilled"),
    ("unet", {"class_embed_type": "timestep"}, "class_embed_type 'timestep' is not supported"),
    ("unet", {"num_class_embeds": 1000}, "num_class_embeds 1000 is not supported"),
    ("unet", {"addition_embed_type": "image"}, "addition_embed_type 'image' is not supported"),
    ("unet", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type 'text_proj' is not supported"),
    ("unet", {"_class_name": "UNet2DModel"}, "a text-to-image model has a UNet2DConditionModel"),
    ("vae", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny; only AutoencoderKL"),
    ("vae", {"shift_factor": 0.1}, "shift_factor 0.1 is not supported"),
    (
        "vae",
        {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        "latents_mean is not supported: a StableDiffusionPipe",
    ),
    ("vae", {"scaling_factor": 0}, "scaling_factor is 0; expected a number"),
    ("vae", {"scaling_factor": "0.18"}, "scaling_factor is '0.18'; expected a number"),
    ("scheduler", {"prediction_type": "sample"}, "expected epsilon or v_prediction"),
    ("scheduler", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
]


@pytest.mark.parametrize(("part", "changes", "match"), TEXT_PARTS)
def test_parts_of_other_kinds_are_refused_before_weights_are_read(copy, part, changes, match):
    folder = copy("sd1")
    edit(folder / part / ("config.json" if part != "scheduler" else "scheduler_config.json"), **changes)
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(ModelError, match=match):
        text_model.check_text_folder(folder)


@pytest.mark.parametrize(
    ("part", "name"), [("vae", "AutoencoderTiny"), ("unet", "UNet2DModel"), ("text_encoder", "T5EncoderModel")]
)
def test_components_that_the_index_names_otherwise_are_refused(copy, part, name):
    folder = copy("sd1")
    edit(folder / "model_index.json", **{part: ["diffusers", name]})
    with pytest.raises(ModelError, match=f"{part} is a {name}; only"):
        text_model.check_text_folder(folder)


@pytest.mark.parametrize("keys", [{"latents_mean": [0.0] * 4}, {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4},
                                  {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}])  # fmt: skip
def test_statistics_of_latents_must_be_whole(copy, keys):
    folder = copy("sdxl")
    edit(folder / "vae" / "config.json", **keys)
    with pytest.raises(ModelError, match="latents_"):
        text_model.check_text_folder(folder)


def test_statistics_of_latents_are_undone_as_they_are_done():
    vae = diffusers.AutoencoderKL.from_config(
        {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2], "scaling_factor": 0.5}
    )
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    decoded = to_decoder(z, vae.config)
    assert torch.allclose(decoded[0, 1], z[0, 1] * 5.9 / 0.5 + 1.9)
    assert torch.allclose(from_encoder(decoded, vae.config), z, atol=1e-5)


def test_stable_diffusions_own_pipeline_never_clips(copy):
    for kind, clips in (("sd1", False), ("sdxl", True)):
        folder = copy(kind)
        edit(folder / "scheduler" / "scheduler_config.json", clip_sample=True)
        schedule = text_model.schedule_of(folder, text_model.check_text_folder(folder))
        assert schedule.clipping["clip_sample"] is clips


@pytest.mark.parametrize(("name", "what"), [("StableDiffusionInpaintPipeline", "an inpainting model"),
                                            ("StableDiffusionDepth2ImgPipeline", "a depth model")])  # fmt: skip
def test_inpainting_and_depth_pipelines_get_their_line(copy, name, what):
    folder = copy("sd1")
    edit(folder / "model_index.json", _class_name=name)
    with pytest.raises(ModelError, match=f"{name} is not supported yet: {what}; inpainting and depth models"):
        is_text_model(folder)


def test_a_lone_unet_of_an_inpainting_model_is_told_as_such(copy, tmp_path):
    folder = Path(shutil.copytree(copy("sd1") / "unet", tmp_path / "lone"))
    with pytest.raises(ModelError, match=r"without a text-to-image model_index.json; fetch the whole model"):
        is_text_model(folder)
    edit(folder / "config.json", in_channels=9)
    with pytest.raises(ModelError, match=r"model_index.json: an inpainting model, which is not supported"):
        is_text_model(folder)


def test_single_files_of_inpainting_and_depth_models_get_their_line(models, tmp_path):
    from safetensors.torch import load_file, save_file

    single = to_single_file(models["sd1"], tmp_path / "model.safetensors")
    tensors = load_file(single)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for channels, what in ((9, "an inpainting model"), (5, "a depth model")):
        save_file({**tensors, first: torch.zeros(16, channels, 3, 3)}, single)
        with pytest.raises(ModelError, match=f"takes {channels} channels: {what}; inpainting and depth models"):
            load_single_file(single, models["sd1"])
    save_file({**tensors, "depth_model.model.weight": torch.zeros(1)}, single)
    with pytest.raises(ModelError, match="a depth model is not supported"):
        load_single_file(single, models["sd1"])


def test_an_added_token_without_a_row_is_named(copy):
    from transformers import CLIPTokenizer

    folder = copy("sd1")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<mycat>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    assert len(text_model.encode_prompts(folder, ["a cat"], "", (32, 32)).prompts) == 1
    with pytest.raises(ModelError, match=r"token '<mycat>' of the prompt 'a <mycat>' has no row"):
        text_model.encode_prompts(folder, ["a cat", "a <mycat>"], "", (32, 32))


def test_text_encoders_that_cannot_encode_are_one_line(copy, monkeypatch):
    from transformers import CLIPTextModel

    def fail(*args, **kwargs):
        raise IndexError("index out of range in self")

    monkeypatch.setattr(CLIPTextModel, "forward", fail)
    with pytest.raises(ModelError, match=r"text encoders cannot read the prompts \(IndexError"):
        text_model.encode_prompts(copy("sd1"), ["a cat"], "", (32, 32))
