"""Folders as models were released give the networks of the plain folder: old names, variants, shards, float8."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import write_tiny_model
from tiny_text_models import tiny_pipeline

from pecker_fast import files
from pecker_fast.errors import ModelError
from pecker_fast.networks import copy_part, load_denoiser, save_part, text_model
from pecker_fast.networks.single_file import load_single_file, load_text_encoder, to_single_file

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
TEXT = files.TEXT_WEIGHTS_NAME


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("plain") / "sdxl", "sdxl")


@pytest.fixture
def folder(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "model")


def rewrite(file: Path, change, to: Path | None = None) -> dict[str, torch.Tensor]:
    """A weights file with each (name, tensor) changed; under another name if `to`."""
    tensors = dict(change(name, tensor) for name, tensor in files.read_tensors(file)[0].items())
    file.unlink()
    files.write_tensors(to or file, tensors, {"format": "pt"})
    return tensors


def old_attention(name, tensor):
    for new, was in OLD.items():
        if f"attentions.0.{new}." in name:
            tensor = tensor[:, :, None, None] if name.endswith("weight") else tensor
            return name.replace(f".{new}.", f".{was}."), tensor
    return name, tensor


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def table(folder: Path) -> torch.Tensor:
    found = text_model.encode_prompts(folder, ["a red circle", "a photo"], "", (32, 32))
    return torch.cat([found.embeds.flatten(), found.pooled.flatten()])


def test_old_attention_of_a_vae_is_read_converted_and_exported(plain, folder, tmp_path):
    stored = rewrite(folder / "vae" / files.WEIGHTS_NAME, old_attention)
    assert stored["encoder.mid_block.attentions.0.query.weight"].ndim == 4
    assert same(text_model.load_networks(folder).vae, text_model.load_networks(plain).vae)
    singles = [to_single_file(model, tmp_path / f"{model.name}.safetensors") for model in (folder, plain)]
    assert singles[0].read_bytes() == singles[1].read_bytes()
    copy_part(folder / "vae", tmp_path / "vae")
    held, wanted = (files.read_tensors(f / files.WEIGHTS_NAME)[0] for f in (tmp_path / "vae", plain / "vae"))
    assert held.keys() == wanted.keys()  # stock diffusers reads no attention weights of four dimensions
    assert all(torch.equal(held[name], wanted[name]) for name in wanted)


def test_old_attention_of_a_class_model_and_its_generator(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    stored = rewrite(folder / "unet" / files.WEIGHTS_NAME, old_attention)
    assert any(name.endswith("attentions.0.proj_attn.bias") for name in stored)
    assert same(load_denoiser(folder).unet, load_denoiser(tiny_model).unet)


def names_with(prefix: bool):
    def change(name, tensor):
        name = name.removeprefix("text_model.")
        return (f"text_model.{name}" if prefix and not name.startswith("text_projection") else name), tensor

    return change


@pytest.mark.parametrize("prefix", [True, False])
def test_text_encoders_with_and_without_their_wrapper(plain, folder, tmp_path, prefix):
    for part in ("text_encoder", "text_encoder_2"):
        tensors = rewrite(folder / part / TEXT, names_with(prefix))
        ids = "text_model.embeddings.position_ids" if prefix else "embeddings.position_ids"
        files.write_tensors(folder / part / TEXT, tensors | {ids: torch.arange(16)[None]}, {"format": "pt"})
        copy_part(folder / part, tmp_path / part)
        held = files.read_tensors(tmp_path / part / TEXT)[0]
        assert all(name.startswith(("text_model.", "text_projection.")) for name in held)
        assert (prefix and ids in held) or not prefix  # what every reader finds stays bit for bit
        assert (folder / part / TEXT).read_bytes() == (tmp_path / part / TEXT).read_bytes() or not prefix
        assert same(load_text_encoder(tmp_path / part), load_text_encoder(plain / part))
    assert torch.equal(table(folder), table(plain))


def test_a_text_encoder_is_what_transformers_loads(plain):
    import transformers

    for part, kind in (("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection")):
        ids = torch.tensor([[3, 1, 2, 5]])
        stock = getattr(transformers, kind).from_pretrained(plain / part).eval()
        ours = load_text_encoder(plain / part)
        assert not ours.training
        with torch.no_grad():
            assert torch.equal(ours(ids)[0], stock(ids)[0])


def half(name, tensor):
    return name, tensor.half() if tensor.is_floating_point() else tensor


def test_a_folder_of_half_precision_variants_alone(plain, folder, tmp_path):
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        name = files.weights_name(part)
        rewrite(folder / part / name, half, folder / part / name.replace(".safetensors", ".fp16.safetensors"))
    networks, wanted = text_model.load_networks(folder), text_model.load_networks(plain)
    for mine, theirs in ((networks.unet, wanted.unet), (networks.vae, wanted.vae)):
        assert same(mine, theirs.half().float())
    assert float((table(folder) - table(plain)).abs().max()) < 0.05
    for part in ("vae", "text_encoder"):
        copy_part(folder / part, tmp_path / part)
        assert [f.name for f in (tmp_path / part).glob("*.safetensors")] == [files.weights_name(part)]
    assert to_single_file(folder, tmp_path / "single.safetensors").is_file()


def test_a_class_model_of_a_variant_alone(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    rewrite(folder / "unet" / files.WEIGHTS_NAME, half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert same(load_denoiser(folder).unet, load_denoiser(tiny_model).unet.half().float())
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors"
    )
    with pytest.raises(ModelError, match=r"non_ema.safetensors\) rename the one you mean"):
        load_denoiser(folder)


def eight(name, tensor):
    return name, tensor.to(torch.float8_e4m3fn) if tensor.is_floating_point() else tensor


def test_float8_is_read_as_the_numbers_it_holds(plain, folder, tmp_path):
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        rewrite(folder / part / files.weights_name(part), eight)
    networks, wanted = text_model.load_networks(folder), text_model.load_networks(plain)
    for mine, theirs in ((networks.unet, wanted.unet), (networks.vae, wanted.vae)):
        assert same(mine, theirs.to(torch.float8_e4m3fn).float())
    single = to_single_file(folder, tmp_path / "single.safetensors")
    assert {t.dtype for t in files.read_tensors(single)[0].values()} == {torch.float8_e4m3fn}
    modules = load_single_file(single, plain)
    assert same(modules["unet"], networks.unet)
    assert {p.dtype for module in modules.values() for p in module.parameters()} == {torch.float32}
    found = text_model.encode_prompts(plain, ["a red circle", "a photo"], "", (32, 32), modules)
    assert torch.equal(torch.cat([found.embeds.flatten(), found.pooled.flatten()]), table(folder))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_damaged_float8_and_quantized_weights_are_one_line(tiny_model, tmp_path, dtype):
    folder = shutil.copytree(tiny_model, tmp_path / "model")

    def hurt(name, tensor):
        return name, torch.full_like(tensor, torch.nan).to(dtype) if name == "conv_in.bias" else tensor

    rewrite(folder / "unet" / files.WEIGHTS_NAME, hurt)
    with pytest.raises(ModelError, match=r"tensor conv_in\.bias holds NaN"):
        load_denoiser(folder)
    rewrite(folder / "unet" / files.WEIGHTS_NAME, lambda k, t: (k, t.to(torch.int8) if k == "conv_in.bias" else t))
    with pytest.raises(ModelError, match="holds int8; quantized weights are not supported"):
        load_denoiser(folder)


def test_parts_of_a_single_file_are_saved_with_the_names_that_all_read(plain, tmp_path):
    import diffusers
    import transformers

    modules = load_single_file(to_single_file(plain, tmp_path / "single.safetensors"), plain)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        save_part(modules[part], tmp_path / part)
        held = files.read_tensors(tmp_path / part / files.weights_name(part))[0]
        if part != "vae":
            assert all(name.startswith(("text_model.", "text_projection.")) for name in held)
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    text = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder_2")
    assert same(vae, modules["vae"])
    assert same(text, modules["text_encoder_2"])


def test_a_part_of_a_read_only_model_becomes_one_that_can_be_changed(folder, tmp_path):
    part = folder / "vae"
    (part / "config.json").rename(part / "real.json")
    (part / "config.json").symlink_to("real.json")
    (part / "weights.bin").write_bytes(b"x")
    for file in part.iterdir():
        if not file.is_symlink():
            file.chmod(0o444)
    copy_part(part, tmp_path / "vae")
    copied = {file.name: file for file in (tmp_path / "vae").iterdir()}
    assert copied.keys() == {"config.json", files.WEIGHTS_NAME}
    for name, file in copied.items():
        assert file.read_bytes() == (part / name).read_bytes()
        assert file.stat().st_mode & 0o200
        assert not file.is_symlink()


def test_the_shapes_model_has_the_names_that_all_read():
    held = files.read_tensors(files.resolve_model("shapes") / "text_encoder" / TEXT)[0]
    assert all(name.startswith("text_model.") for name in held)
    assert len(held) == 36


def test_an_index_without_a_part_that_is_needed(folder):
    index = files.read_index(folder)
    files.write_json(folder / "model_index.json", index | {"vae": [None, None]})
    with pytest.raises(ModelError, match=r"has no vae \(\[null, null\]\)"):
        text_model.check_text_folder(folder)
    files.write_json(folder / "model_index.json", index | {"_class_name": ["pipeline", "Evil"]})
    with pytest.raises(ModelError, match="_class_name names custom code"):
        files.check_model_folder(folder)
    assert not text_model.is_text_model(write_tiny_model(folder / "classes", judge=False))
