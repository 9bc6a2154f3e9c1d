"""Single files in the original layout: names against diffusers' own converters, bits there and back."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pecker_fast import files
from pecker_fast.errors import ModelError
from pecker_fast.networks.single_file import (
    kind_of_single_file,
    load_single_file,
    parts,
    replace_unet,
    to_single_file,
    unet_map,
)

KINDS = ("sd1", "sd2", "sdxl")
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP = {CROSS: "CrossAttnUpBlock2D", PLAIN: "UpBlock2D"}
REAL_UNETS = {
    "sd1": {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768},
    "sd2": {
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": [PLAIN, CROSS, CROSS],
        "up_block_types": [UP[CROSS], UP[CROSS], UP[PLAIN]],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
REAL_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280}
REAL_TEXT = {
    "sd1": {"text_encoder": CLIP_L},
    "sd2": {"text_encoder": CLIP_H},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G | {"num_attention_heads": 20}},
}


def tiny_unet(kind: str) -> dict:
    shared = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": [8, 16], "norm_num_groups": 4}
    if kind != "sdxl":
        down = [CROSS, PLAIN]
        shared |= {"cross_attention_dim": 16, "attention_head_dim": 4, "use_linear_projection": kind == "sd2"}
    else:
        down = [PLAIN, CROSS]
        shared |= {key: REAL_UNETS["sdxl"][key] for key in ("use_linear_projection", "addition_embed_type")}
        shared |= {"cross_attention_dim": 40, "attention_head_dim": [2, 4], "transformer_layers_per_block": [1, 2]}
        shared |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 20 + 48}
    return shared | {"down_block_types": down, "up_block_types": [UP[block] for block in reversed(down)]}


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Every tensor different from every other: biases and norms start alike, and swapped ones would go unseen."""
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.normal_()
    return module


def write_folder(folder: Path, kind: str, seed: int = 0) -> Path:
    """A diffusers folder of a kind with random weights; the two text encoders of SDXL differ in width, as they do."""
    import diffusers
    import transformers

    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[4, 8, 8],
        norm_num_groups=2,
    )
    randomise(vae).save_pretrained(folder / "vae")
    unet = diffusers.UNet2DConditionModel(**tiny_unet(kind))
    randomise(unet).save_pretrained(folder / "unet")
    text = {"vocab_size": 30, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    act = "gelu" if kind == "sd2" else "quick_gelu"
    config = transformers.CLIPTextConfig(**text, hidden_size=16, projection_dim=16, hidden_act=act)
    randomise(transformers.CLIPTextModel(config)).save_pretrained(folder / "text_encoder")
    index = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    index = {name: ["diffusers", cls] for name, cls in index.items()} | {
        "_class_name": "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if kind == "sdxl":
        config = transformers.CLIPTextConfig(**text, hidden_size=24, projection_dim=20, hidden_act="gelu")
        randomise(transformers.CLIPTextModelWithProjection(config)).save_pretrained(folder / "text_encoder_2")
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"]}
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {kind: write_folder(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def singles(folders, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("single")
    return {kind: to_single_file(folder, root / f"{kind}.safetensors") for kind, folder in folders.items()}


def stored(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return files.read_tensors(file)[0]


def assert_same(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype, name
        assert files.sha256_tensors([(name, given[name])]) == files.sha256_tensors([(name, tensor)]), name


@pytest.mark.parametrize("kind", KINDS)
def test_stock_diffusers_reads_the_same_bits(kind, folders, singles):
    import diffusers

    folder = folders[kind]
    cls = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
    absent = {"tokenizer": None, "tokenizer_2": None} if kind == "sdxl" else {"tokenizer": None}
    absent |= {"feature_extractor": None} if kind == "sdxl" else {"feature_extractor": None, "safety_checker": None}
    pipeline = cls.from_single_file(str(singles[kind]), config=str(folder), local_files_only=True, **absent)
    for part in parts.parts_of(kind):
        assert_same(getattr(pipeline, part).state_dict(), stored(folder, part))


@pytest.mark.parametrize("kind", KINDS)
def test_load_gives_the_folders_modules(kind, folders, singles):
    modules = load_single_file(singles[kind], folders[kind])
    assert tuple(modules) == parts.parts_of(kind)
    for part, module in modules.items():
        assert_same(module.state_dict(), stored(folders[kind], part))
        assert not module.training
        assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
    ids = torch.tensor([[0, 5, 2]])
    text = modules["text_encoder"](ids).last_hidden_state
    stock = type(modules["text_encoder"]).from_pretrained(folders[kind] / "text_encoder")(ids).last_hidden_state
    torch.testing.assert_close(text, stock, rtol=0, atol=0)


def test_dtypes_shards_and_old_names_survive(folders, singles, tmp_path):
    import diffusers

    folder = shutil.copytree(folders["sd1"], tmp_path / "folder")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").to(torch.bfloat16)
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="60KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = stored(folder, "vae")
    for new, name in old.items():
        vae = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): t.half() for key, t in vae.items()}
    files.write_tensors(folder / "vae" / files.WEIGHTS_NAME, vae)
    text = {f"text_model.{name}": tensor for name, tensor in stored(folder, "text_encoder").items()}
    text["text_model.embeddings.position_ids"] = torch.arange(6)[None]
    files.write_tensors(folder / "text_encoder" / "model.safetensors", text)

    single, _ = files.read_tensors(to_single_file(folder, tmp_path / "single.safetensors"))
    plain, _ = files.read_tensors(singles["sd1"])
    assert single.keys() == plain.keys()
    casts = {"model.diffusion_model.": torch.bfloat16, "first_stage_model.": torch.float16}
    for name, tensor in plain.items():
        dtype = next((dtype for prefix, dtype in casts.items() if name.startswith(prefix)), tensor.dtype)
        assert torch.equal(single[name], tensor.to(dtype)), name
        assert single[name].dtype == dtype
    modules = load_single_file(tmp_path / "single.safetensors", folder)
    assert (modules["unet"].dtype, modules["vae"].dtype) == (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("kind", "count"), [("sd1", 686), ("sd2", 686), ("sdxl", 1680)])
def test_real_configurations_map_to_the_names_that_diffusers_knows(kind, count):
    from diffusers.loaders import single_file_utils as stock

    whole = {}
    configs = {"unet": REAL_UNETS[kind], "vae": REAL_VAE} | REAL_TEXT[kind]
    modules = {part: parts.empty_module(part, config) for part, config in configs.items()}
    for part, module in modules.items():
        weights = {parts.canonical(part, name): tensor for name, tensor in module.state_dict().items()}
        whole |= parts.to_original(parts.plan_of(part, kind, weights), weights)
    assert stock.infer_diffusers_model_type(whole) == {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base"}[kind]
    assert kind_of_single_file(whole) == kind
    names = unet_map(REAL_UNETS[kind])
    assert len(names) == count == sum(name.startswith("model.diffusion_model.") for name in whole)
    traced = stock.convert_ldm_unet_checkpoint({b: a for a, b in names.items()}, dict(modules["unet"].config))
    assert traced == {name: name for name in names}
    # diffusers reads either spelling of these two, the tools of the original layout only their own
    sampled = re.compile(r"model\.diffusion_model\.(output_blocks\.\d+\.\d+\.conv\.weight)")
    assert {found[1] for found in map(sampled.fullmatch, whole) if found} == {
        "sd1": {"output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "output_blocks.8.2.conv.weight"},
        "sd2": {"output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "output_blocks.8.2.conv.weight"},
        "sdxl": {"output_blocks.2.2.conv.weight", "output_blocks.5.2.conv.weight"},
    }[kind]
    for name in ("q", "k", "v", "proj_out"):
        for coder in ("encoder", "decoder"):
            assert whole[f"first_stage_model.{coder}.mid.attn_1.{name}.weight"].shape == (512, 512, 1, 1)
    vae = stock.convert_ldm_vae_checkpoint(whole, dict(modules["vae"].config))
    assert {name: t.shape for name, t in vae.items()} == parts.shapes_of("vae", modules["vae"])
    for part in REAL_TEXT[kind]:
        prefix = parts.prefix_of(part, kind)
        if prefix.endswith("transformer."):
            text = stock.convert_ldm_clip_checkpoint(whole)
        else:
            text = stock.convert_open_clip_checkpoint(modules[part], whole, prefix=prefix)
        assert {name: t.shape for name, t in text.items()} == parts.shapes_of(part, modules[part])


@st.composite
def unet_configs(draw) -> dict:
    levels = draw(st.integers(2, 4))
    down = draw(st.lists(st.sampled_from([CROSS, PLAIN]), min_size=levels, max_size=levels))
    return {
        "block_out_channels": [4 * draw(st.integers(1, 3)) for _ in down],
        "down_block_types": down,
        "up_block_types": [UP[block] for block in draw(st.permutations(down))],
        "layers_per_block": draw(st.integers(1, 3)),
        "transformer_layers_per_block": draw(st.integers(1, 2)),
        "norm_num_groups": 2,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "use_linear_projection": draw(st.booleans()),
        "num_class_embeds": draw(st.sampled_from([None, 3])),
    }


@given(unet_configs())
@settings(max_examples=12, deadline=None)
def test_any_layout_maps_to_the_names_that_diffusers_knows(config):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    names = unet_map(config)
    assert convert_ldm_unet_checkpoint({b: a for a, b in names.items()}, config) == {name: name for name in names}


def test_replace_unet_leaves_all_else_alone(folders, singles, tmp_path):
    tensors, _ = files.read_tensors(singles["sdxl"])
    tensors |= {"alphas_cumprod": torch.rand(3), "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6)}
    files.write_tensors(tmp_path / "base.safetensors", tensors, {"modelspec.title": "a title"})
    unet = {name: torch.randn_like(tensor) for name, tensor in stored(folders["sdxl"], "unet").items()}
    config = files.read_json(folders["sdxl"] / "unet" / "config.json")
    output = replace_unet(tmp_path / "base.safetensors", tmp_path / "new.safetensors", unet, config)
    new, metadata = files.read_tensors(output)
    names = unet_map(config)
    assert_same(new, tensors | {names[name]: tensor for name, tensor in unet.items()})
    assert metadata == {"modelspec.title": "a title"}
    assert_same(load_single_file(output, folders["sdxl"])["unet"].state_dict(), unet)
    whole = to_single_file(folders["sdxl"], tmp_path / "whole.safetensors", unet=unet)
    assert_same({**new, **files.read_tensors(whole)[0]}, new)


def test_replace_unet_refuses_what_is_not_its_unet(folders, singles, tmp_path):
    unet = stored(folders["sd1"], "unet")
    config = files.read_json(folders["sd1"] / "unet" / "config.json")

    def refused(single: Path, tensors: dict, match: str) -> None:
        with pytest.raises(ModelError, match=match):
            replace_unet(single, tmp_path / "new.safetensors", tensors, config)
        assert not (tmp_path / "new.safetensors").exists()

    refused(singles["sdxl"], unet, "has no place for|lacks")
    refused(singles["sd1"], {**unet, "extra": torch.ones(1)}, "has no place for extra")
    refused(singles["sd1"], {**unet, "conv_in.bias": torch.ones(1)}, r"conv_in.bias has shape \[1\]")
    refused(singles["sd1"], {name: unet[name] for name in list(unet)[1:]}, "lacks")
    averaged = files.read_tensors(singles["sd1"])[0] | {"model_ema.diffusion_modelconv": torch.ones(1)}
    files.write_tensors(tmp_path / "ema.safetensors", averaged)
    refused(tmp_path / "ema.safetensors", unet, "averaged copy")


def test_loading_is_strict(folders, singles, tmp_path):
    tensors, _ = files.read_tensors(singles["sd2"])
    prefix = "cond_stage_model.model."
    spare = {f"{prefix}transformer.resblocks.2.ln_1.bias": torch.ones(16), f"{prefix}text_projection": torch.ones(2, 2)}
    spare |= {
        f"{prefix}logit_scale": torch.tensor(1.0),
        "betas": torch.ones(3),
        "first_stage_model.loss.x": torch.ones(1),
    }

    def load(changed: dict):
        files.write_tensors(tmp_path / "file.safetensors", changed)
        return load_single_file(tmp_path / "file.safetensors", folders["sd2"])

    for part, module in load(tensors | spare).items():
        assert_same(module.state_dict(), stored(folders["sd2"], part))
    for name in tensors:
        if "norm" in name or "ln_" in name or "in_proj" in name or "mid.attn_1.q" in name:
            with pytest.raises(ModelError, match=r"lacks|not supported"):
                load({key: tensor for key, tensor in tensors.items() if key != name})
            with pytest.raises(ModelError, match="shape"):
                load(tensors | {name: torch.ones(1, 1, 1)})
            break
    for name in ("in_proj_weight", "text_projection", "attn_1.q.weight", "positional_embedding"):
        kind = "sdxl" if name == "text_projection" else "sd2"
        held = files.read_tensors(singles[kind])[0]
        (found, *_) = [key for key in held if key.endswith(name)]
        files.write_tensors(tmp_path / "file.safetensors", held | {found: torch.ones(5, 7)})
        with pytest.raises(ModelError, match="shape"):
            load_single_file(tmp_path / "file.safetensors", folders[kind])
    (bias, *_) = [name for name in tensors if name.endswith("conv_in.bias")]
    for value, match in ((torch.nan, "holds NaN"), (None, "holds int8; quantized")):
        numbers = tensors[bias].to(torch.int8) if value is None else torch.full_like(tensors[bias], value)
        with pytest.raises(ModelError, match=match):
            load(tensors | {bias: numbers})
    with pytest.raises(ModelError, match=r"named after a wrapper \(module\.…\)"):
        load({f"module.{name}": tensor for name, tensor in tensors.items()})
    for name in (
        "model.diffusion_model.extra",
        "first_stage_model.extra",
        f"{prefix}transformer.resblocks.3.ln_1.bias",
    ):
        with pytest.raises(ModelError, match="no place for"):
            load(tensors | {name: torch.ones(1)})
    with pytest.raises(ModelError, match=r"no place for|lacks|shape"):
        load_single_file(singles["sd2"], folders["sd1"])


def test_kinds_that_are_not_supported_are_named():
    unet, vae = "model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias"
    for keys, match in [
        ([unet, vae, "conditioner.embedders.0.model.ln_final.bias"], "refiner"),
        ([unet, vae, "control_model.input_hint_block.0.bias"], "ControlNet"),
        (["lora_unet_mid_block.alpha"], "LoRA"),
        (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        (["double_blocks.0.img_attn.norm"], "Flux"),
        (["down_blocks.0.resnets.0.norm1.bias"], "diffusers' names"),
        ([unet, vae], "without a text encoder"),
        ([unet, "cond_stage_model.transformer.x"], "without the image decoder"),
        (["x"], "unknown"),
        ([], "unknown"),
    ]:
        with pytest.raises(ModelError, match=match) as error:
            kind_of_single_file(keys)
        assert "not supported yet" in str(error.value)


def test_a_folder_that_is_damaged_or_of_another_kind_is_refused(folders, tmp_path):
    def broken(change, match: str) -> None:
        folder = shutil.copytree(folders["sd1"], tmp_path / "broken")
        change(folder)
        with pytest.raises(ModelError, match=match):
            to_single_file(folder, tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()
        shutil.rmtree(folder)

    def edit(part: str, **keys):
        def change(folder: Path) -> None:
            path = folder / part / "config.json" if part else folder / "model_index.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | keys))

        return change

    broken(edit("", _class_name="FluxPipeline"), "FluxPipeline")
    broken(edit("unet", down_block_types=["AttnDownBlock2D", PLAIN]), "AttnDownBlock2D")
    broken(edit("unet", block_out_channels=[8, 24]), "shape")
    broken(edit("unet", layers_per_block=2), "lacks")
    broken(edit("unet", block_out_channels="many"), "block_out_channels is .many.; expected a list")
    broken(edit("unet", norm_num_groups=5), "makes no module")
    broken(edit("unet", _class_name="UNet2DModel"), "UNet2DModel")
    broken(edit("unet", time_cond_proj_dim=4), "cond_proj|lacks")
    broken(edit("text_encoder", hidden_act="relu"), "relu")
    broken(edit("text_encoder", auto_map={"AutoModel": "x.py"}), "custom code")
    broken(lambda folder: shutil.rmtree(folder / "vae"), "vae")
    broken(lambda folder: (folder / "text_encoder" / "model.safetensors").unlink(), "model.safetensors")
    broken(lambda folder: (folder / "unet" / files.WEIGHTS_NAME).write_bytes(b"\x80\x04pickle"), "pickle")
