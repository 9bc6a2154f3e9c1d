"""A model folder cannot run code, reach outside itself, or pass for something it is not."""

import json
import os
from pathlib import Path

import pytest
import torch

from pecker_fast import files
from pecker_fast.errors import ModelError

INDEX = f"{files.WEIGHTS_NAME}.index.json"


def put(folder: Path, name: str, content) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def config_with(**keys):
    return lambda folder: put(folder, "unet/config.json", {"_class_name": "UNet2DModel", **keys})


def index_with(**keys):
    return lambda folder: put(folder, "model_index.json", {"_class_name": "DDPMPipeline", **keys})


def shards(names):
    def hurt(folder):
        (folder / "unet" / files.WEIGHTS_NAME).rename(folder / "outside.safetensors")
        put(folder, f"unet/{INDEX}", {"weight_map": names})

    return hurt


def link(name, target):
    def hurt(folder):
        path = folder / name
        if path.exists():
            path.unlink()
        path.symlink_to(target)

    return hurt


def linked_unet(folder):
    (folder / "unet").rename(folder.parent / "elsewhere")
    (folder / "unet").symlink_to(folder.parent / "elsewhere")


def without(name):
    return lambda folder: (folder / name).unlink()


WEIGHTS = f"unet/{files.WEIGHTS_NAME}"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 3438167540\n"
HOSTILE = {
    "auto_map": (config_with(auto_map={"AutoModel": "evil.Model"}), "auto_map names custom code"),
    "custom_pipeline": (index_with(custom_pipeline="evil"), "custom_pipeline names custom code"),
    "class in a module": (index_with(_class_name=["pipeline", "Evil"]), "_class_name names custom code"),
    "class of the unet in a module": (
        config_with(_class_name=["evil", "UNet2DModel"]),
        "_class_name names custom code",
    ),
    "library of its own": (index_with(unet=["my_module", "UNet2DModel"]), "unet names custom code"),
    "library os": (index_with(scheduler=["os", "system"]), "scheduler names custom code"),
    "another class in a place that is used": (
        index_with(unet=["diffusers", "FluxTransformer2DModel"]),
        "unet is a FluxTransformer2DModel; only UNet2DModel or UNet2DConditionModel is supported in its place",
    ),
    "another library in a place that is used": (
        index_with(vae=["stable_diffusion", "StableDiffusionSafetyChecker"]),
        "vae names custom code",
    ),
    "a checker of its own": (index_with(safety_checker=["checker", "Checker"]), "safety_checker names custom code"),
    "a checker of its own under a known name": (
        index_with(safety_checker=["my_checker", "StableDiffusionSafetyChecker"]),
        "safety_checker names custom code",
    ),
    "a class of its own under a known module": (
        index_with(extra=["stable_diffusion", "Evil"]),
        "extra names custom code",
    ),
    "code in the tokenizer": (
        lambda folder: put(folder, "tokenizer_2/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Evil"]}}),
        "auto_map names custom code",
    ),
    "code deep in a config": (config_with(text_config={"vision": {"auto_map": {"A": "b"}}}), "auto_map names custom"),
    "code in the generator": (
        lambda folder: put(folder, "generator/config.json", {"auto_map": {"x": "y"}}),
        "auto_map names custom code",
    ),
    "a Python file": (config_with(model_file="evil.py"), "model_file names custom code"),
    "code on the hub": (config_with(model_type="someone/repository--evil.py.Model"), "model_type names custom code"),
    "code in the scheduler": (
        lambda folder: put(folder, "scheduler/scheduler_config.json", {"auto_map": {"x": "y"}}),
        "auto_map names custom code",
    ),
    "code in the judge": (
        lambda folder: put(folder, "judge/config.json", {"auto_map": {"x": "y"}}),
        "names custom code",
    ),
    "config is a list": (lambda folder: put(folder, "unet/config.json", [1]), "a JSON object was expected"),
    "config is cut": (lambda folder: put(folder, "unet/config.json", b'{"_class_name": '), "damaged JSON, line 1"),
    "config is binary": (lambda folder: put(folder, "unet/config.json", b"\x80\x04\x95"), "not UTF-8 text"),
    "config is deep": (lambda folder: put(folder, "unet/config.json", b"[" * 100_000), "damaged JSON"),
    "config is huge": (lambda folder: put(folder, "unet/config.json", b" " * (9 << 20)), "too long for a text file"),
    "config is missing": (without("unet/config.json"), "no unet/config.json or config.json"),
    "another network": (config_with(_class_name="FluxTransformer2DModel"), "only UNet2DModel and UNet2DCond"),
    "no class name": (lambda folder: put(folder, "unet/config.json", {}), "only UNet2DModel and"),
    "weights are missing": (without(WEIGHTS), "the folder holds no safetensors weights"),
    "weights are empty": (lambda folder: put(folder, WEIGHTS, b""), "not a safetensors file, or cut short"),
    "weights are text": (lambda folder: put(folder, WEIGHTS, b"some text, and more"), "not a safetensors file"),
    "weights are a pointer": (lambda folder: put(folder, WEIGHTS, POINTER), "run `git lfs pull`"),
    "a config is a pointer": (lambda folder: put(folder, "unet/config.json", POINTER), "run `git lfs pull`"),
    "merges are a pointer": (lambda folder: put(folder, "tokenizer/merges.txt", POINTER), "run `git lfs pull`"),
    "weights are a folder": (
        lambda folder: (without(WEIGHTS)(folder), (folder / WEIGHTS).mkdir()),
        "not a regular file",
    ),
    "weights link to a system file": (link(WEIGHTS, "/etc/hostname"), "a link that leaves the model folder"),
    "weights link upwards": (link(WEIGHTS, "../../secret.safetensors"), "a link that leaves the model folder"),
    "config links out": (link("unet/config.json", "/etc/hostname"), "a link that leaves the model folder"),
    "unet links out": (linked_unet, "a link that leaves the model folder"),
    "judge links out": (link("judge", "/etc"), "a link that leaves the model folder"),
    "shard above": (shards({"a": "../outside.safetensors"}), "it is not followed"),
    "shard absolute": (shards({"a": "/etc/hostname"}), "it is not followed"),
    "shard pickle": (shards({"a": "model.bin"}), "it is not followed"),
    "shard backwards in the middle": (shards({"a": "x/../../outside.safetensors"}), "it is not followed"),
    "shard missing": (shards({"a": "model-00001.safetensors"}), "missing, although"),
    "shard map empty": (shards({}), "no weight_map of file names"),
    "shard map of numbers": (shards({"a": 1}), "no weight_map of file names"),
}


@pytest.fixture
def model(tmp_path):
    """A folder that is in order, as far as can be seen without building the network."""
    folder = tmp_path / "model"
    config_with()(folder)
    index_with(unet=["diffusers", "UNet2DModel"], scheduler=["diffusers", "DDPMScheduler"], extra=[None, None])(folder)
    put(folder, "scheduler/scheduler_config.json", {"_class_name": "DDPMScheduler"})
    files.write_tensors(folder / WEIGHTS, {"a": torch.ones(3)})
    files.write_tensors(tmp_path / "secret.safetensors", {"a": torch.zeros(3)})
    return folder


def test_the_folder_in_order_is_accepted(model):
    assert files.check_model_folder(model) == model / "unet"
    assert files.read_weights(model / "unet")["a"].tolist() == [1, 1, 1]


BESIDE = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "safe_checker": ["stable_diffusion_safe", "SafeStableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "image_processor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "watermark": ["stable_diffusion_xl", "StableDiffusionXLWatermarker"],
    "watermarker": ["pipelines", "IFWatermarker"],
}


def test_known_parts_beside_the_model_are_left_out_and_told(model):
    assert files.model_notes(model) == []
    index_with(**BESIDE, unet=["diffusers", "UNet2DModel"], nothing=[None, None], mean=[0.5, 0.5, 0.5])(model)
    put(model, "safety_checker/config.json", b"\x80 never read")
    assert files.check_model_folder(model) == model / "unet"
    (note,) = files.model_notes(model)
    assert note == f"{model}: left out, never loaded: {', '.join(BESIDE)}"
    plain = files.without_parts_beside(
        files.read_index(model) | {"requires_safety_checker": True, "_name_or_path": "x"}
    )
    assert {name: plain[name] for name in BESIDE} == {name: [None, None] for name in BESIDE}
    assert plain["unet"] == ["diffusers", "UNet2DModel"]
    assert plain["requires_safety_checker"] is False
    assert "_name_or_path" not in plain


def test_words_are_no_code(model):
    put(model, "tokenizer/vocab.json", {"auto_map": 1, "a": 2})
    files.check_model_folder(model)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_damaged_folder_is_refused(model, name):
    hurt, message = HOSTILE[name]
    hurt(model)
    with pytest.raises(ModelError) as caught:
        files.check_model_folder(model)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


def doors(folder):
    """By every way in that takes a folder: as model, generator, base of a delta, in `doctor`."""
    from pecker_fast.export.delta import delta_of_folders
    from pecker_fast.loading import load_model, start_generator
    from pecker_fast.machine.hardware import _model
    from pecker_fast.recipe import recipe_from

    keys = {"forget": 0, "cover": 1, "output": "unused"}
    yield lambda: load_model(recipe_from({**keys, "model": str(folder)}))
    yield lambda: start_generator(recipe_from({**keys, "generator": str(folder)}), None)
    yield lambda: delta_of_folders(folder, folder, folder.parent / "delta.safetensors")
    (check,) = _model("model", str(folder))
    assert check.state == "missing"


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_by_every_way_in(model, name):
    HOSTILE[name][0](model)
    for enter in doors(model):
        with pytest.raises(ModelError) as caught:
            enter()
        assert len(str(caught.value)) < 600
        assert "\n" not in str(caught.value)


def test_links_inside_the_folder_and_the_hub_cache_are_followed(model, tmp_path):
    (model / WEIGHTS).rename(model / "real.safetensors")
    (model / WEIGHTS).symlink_to("../real.safetensors")
    assert files.check_model_folder(model) == model / "unet"

    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "0123abc"
    (cache / "blobs").mkdir(parents=True)
    config_with()(snapshot)
    os.replace(model / "real.safetensors", cache / "blobs" / "sha")
    (snapshot / WEIGHTS).symlink_to("../../../blobs/sha")
    assert files.check_model_folder(snapshot) == snapshot / "unet"
    (snapshot / "unet" / "config.json").unlink()
    (snapshot / "unet" / "config.json").symlink_to("../../../../secret.json")
    with pytest.raises(ModelError, match="a link that leaves"):
        files.check_model_folder(snapshot)


def test_shards_are_joined_in_order(model):
    (model / WEIGHTS).unlink()
    for number, name in enumerate("ba"):
        files.write_tensors(model / "unet" / f"part-{number}.safetensors", {name: torch.full((2,), number)})
    put(model, f"unet/{INDEX}", {"weight_map": {"b": "part-0.safetensors", "a": "part-1.safetensors"}})
    files.check_model_folder(model)
    assert {k: v.tolist() for k, v in files.read_weights(model / "unet").items()} == {"b": [0, 0], "a": [1, 1]}


def test_a_config_at_the_top_is_a_model_too(model):
    for name in ("config.json", files.WEIGHTS_NAME):
        (model / "unet" / name).rename(model / name)
    (model / "unet").rmdir()
    assert files.check_model_folder(model) == model


@pytest.mark.parametrize(
    "name", ["digitz", "/no/such/folder", "runs/nothing-here", "../x", "a/../b", "a//b", "", "x" * 9000]
)
def test_a_name_of_nothing_is_refused_without_asking_the_network(monkeypatch, name):
    monkeypatch.setattr(
        "pecker_fast.files.names._from_hub", lambda name, revision: pytest.fail(f"asked the network for {name}")
    )
    with pytest.raises(ModelError):
        files.resolve_model(name)


def test_local_folders_stand_before_the_hub(monkeypatch, model, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    monkeypatch.setattr("pecker_fast.files.names._from_hub", lambda name, revision: Path("/fetched"))
    assert files.resolve_model("model") == Path("model")
    with pytest.raises(ModelError, match="no such model folder"):
        files.resolve_model("owner/name")  # `owner` is a folder here: a local path was meant
    assert files.resolve_model("google/ddpm") == Path("/fetched")


def test_a_shipped_name_stands_before_a_local_folder(monkeypatch, tmp_path):
    (tmp_path / "assets" / "tiny").mkdir(parents=True)
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pecker_fast.files.names.ASSETS", tmp_path / "assets")
    assert files.resolve_model("tiny") == tmp_path / "assets" / "tiny"
    assert files.resolve_model("./tiny") == Path("tiny")
