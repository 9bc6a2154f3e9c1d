"""Every way by which a foreign folder comes in beside `model`: generators, config folders, prompt files, text encoders,
tokenizers. What a config could make a library load, fetch or build is refused, and weights are those of the config, no more."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from odd_folders import write_models
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from pecker_fast import files
from pecker_fast.errors import ModelError, PeckerError
from pecker_fast.evaluate.judge import load_judge
from pecker_fast.loading import load_model
from pecker_fast.loading.parts import load_start
from pecker_fast.networks import load_unet, text_model
from pecker_fast.networks.single_file import load_single_file, load_text_encoder, to_single_file
from pecker_fast.networks.tokenizer import load_tokenizer
from pecker_fast.recipe import recipe_from

NARROW = (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("doors") / "models")


@pytest.fixture
def fresh(models, tmp_path):
    return lambda kind, name="model": shutil.copytree(models / kind, tmp_path / name)


def edit(path: Path, **keys) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **keys}))


def change(path: Path, how) -> None:
    tensors = load_file(path)
    how(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def refused(load, *arguments, about: str) -> None:
    with pytest.raises(PeckerError) as caught:
        load(*arguments)
    line = str(caught.value)
    assert about in line, line
    assert "\n" not in line
    assert len(line) < 600


# --- text encoders and tokenizers

KERNELS = ("attn_implementation", "_attn_implementation")
LOADING = [
    *({key: value} for key in KERNELS for value in ("someone/kernels", "flash_attention_2")),
    *({"quantization_config": {"quant_method": "bitsandbytes"}}, {"dtype": "load"}, {"torch_dtype": "int8"}),
    *({"auto_map": {"AutoModel": "evil.Model"}}, {"extra": [{"auto_map": {"AutoModel": "evil.Model"}}]}),
    *({"model_type": "t5"}, {"pruned_heads": {"0": [1]}}),
    *({"text_config": {"num_hidden_layers": 10**6}}, {"text_config": [1]}, {"num_hidden_layers": 10**5}),
    *({"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"max_position_embeddings": 65536}, {"num_attention_heads": 7}),
]  # fmt: skip


@pytest.mark.parametrize("keys", LOADING, ids=str)
def test_a_text_encoder_is_built_of_its_own_weights_or_not_at_all(fresh, keys):
    folder = fresh("sd1") / "text_encoder"
    edit(folder / "config.json", **keys)
    refused(load_text_encoder, folder, about=str(folder))


def test_keys_that_are_no_clip_text_encoders_do_not_reach_the_library(fresh):
    """`num_labels` alone would make a table of a thousand million names."""
    folder = fresh("sd1") / "text_encoder"
    plain = load_text_encoder(folder).state_dict()
    edit(
        folder / "config.json",
        num_labels=10**9,
        to_dict=1,
        torch_dtype="float16",
        _attn_implementation="sdpa",
        return_dict=False,
    )
    found = load_text_encoder(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_layers_that_a_config_does_not_count_are_not_dropped(fresh, tmp_path):
    """A text encoder of Stable Diffusion 2 has one more layer in its original file; ours, written without it, do not."""
    from tiny_text_models import tiny_pipeline

    folder = tiny_pipeline(tmp_path / "sd2", "sd2")
    single = to_single_file(folder, tmp_path / "single.safetensors")
    assert load_single_file(single, folder)
    edit(folder / "text_encoder" / "config.json", num_hidden_layers=1)
    refused(load_single_file, single, folder, about="resblocks.1")


TOKENIZER = [
    *({"gguf_file": "x.gguf"}, {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}, {"vocab": "/etc/hostname"}, {"merges": ["a b"]}),
    *({"init_inputs": ["/etc/hostname"]}, {"tokenizer_object": "x"}, {"truncation_side": "left"}, {"padding_side": "left"}),
    *({"model_max_length": 10**9}, {"bos_token": 7}, {"extra_special_tokens": [f"<{i}>" for i in range(2000)]}),
    {"added_tokens_decoder": {str(i): {"content": f"<{i}>"} for i in range(100_000)}},
    *({"added_tokens_decoder": {number: {"content": "x"}}} for number in ("-1", "1e9", "9" * 5000, "a")),
    *({"added_tokens_decoder": {"5": token}} for token in ({"content": "x", "evil": 1}, {"content": 5}, "x", [])),
    {"eos_token": {"__type": "AddedToken", "content": 5}},
]  # fmt: skip


@pytest.mark.parametrize("keys", TOKENIZER, ids=lambda keys: str(keys)[:50])
def test_a_tokenizer_names_no_other_files_and_adds_few_tokens(fresh, keys):
    folder = fresh("sd1") / "tokenizer"
    edit(folder / "tokenizer_config.json", **keys)
    refused(load_tokenizer, folder, 16, about=str(folder))


WHOLE = {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AAAA"}]},
    "model": {"type": "Unigram", "vocab": []},
    "added_tokens": [{"id": 10**12, "content": "x"}],
    "decoder": {"type": ["x"]},
}


@pytest.mark.parametrize("key", WHOLE)
def test_a_whole_tokenizer_is_of_pieces_that_are_read_without_a_panic(fresh, key, capfd):
    folder = fresh("sdxl") / "tokenizer"
    assert load_tokenizer(folder, 16)
    edit(folder / "tokenizer.json", **{key: WHOLE[key]})
    refused(load_tokenizer, folder, 16, about=str(folder))
    assert capfd.readouterr().err == ""


def test_a_tokenizer_is_made_of_known_files_alone(fresh, tmp_path, monkeypatch):
    """Templates, other versions and paths of another machine are left alone; links out are refused, in any known file."""
    folder = fresh("sd1") / "tokenizer"
    plain = load_tokenizer(folder, 16)("a red circle").input_ids
    (tmp_path / "secret.jinja").write_text("{{ secret }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path / "secret.jinja")
    for name in ("tokenizer.model", "tekken.json", "tokenizer.4.0.0.json", "chat_template.jinja"):
        (folder / name).write_text("damaged")
    edit(
        folder / "tokenizer_config.json",
        vocab_file="/etc/hostname",
        tokenizer_file="/elsewhere/x.json",
        chat_template="{{ 1/0 }}",
    )
    found = load_tokenizer(folder, 16)
    assert found("a red circle").input_ids == plain
    assert not found.chat_template
    for name in files.SMALL_FILES["tokenizer"]:
        kept = (folder / name).read_bytes() if (folder / name).exists() else b'{"x": 5}'
        (tmp_path / name).write_bytes(kept)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / name)
        refused(load_tokenizer, folder, 16, about="leaves the model folder")
        (folder / name).unlink()
        (folder / name).write_bytes(kept)


# --- weights


def test_weights_that_are_no_floating_point_numbers_are_refused_in_every_part(fresh):
    text, classes, single = fresh("sd1"), fresh("class", "classes"), fresh("single", "single")
    loads = {
        text / "unet" / files.WEIGHTS_NAME: (load_unet, text / "unet"),
        text / "text_encoder" / files.TEXT_WEIGHTS_NAME: (load_text_encoder, text / "text_encoder"),
        classes / "judge" / "model.safetensors": (load_judge, classes / "judge"),
        single / "single.safetensors": (load_single_file, single / "single.safetensors", single),
    }
    for path, (load, *arguments) in loads.items():
        whole = path.read_bytes()
        first = min(load_file(path))
        for dtype in NARROW:
            change(path, lambda tensors, name=first, kind=dtype: tensors.update({name: tensors[name].to(kind)}))
            refused(load, *arguments, about=str(dtype).removeprefix("torch."))
            path.write_bytes(whole)


def test_what_does_not_belong_to_the_config_is_not_read(fresh):
    """A tensor of gigabytes, of a file with a hole in it: refused by the header."""
    text, classes, single = fresh("sd1"), fresh("class", "classes"), fresh("single", "single")
    loads = {
        text / "vae" / files.WEIGHTS_NAME: (text_model.load_networks, text),
        text / "text_encoder" / files.TEXT_WEIGHTS_NAME: (load_text_encoder, text / "text_encoder"),
        classes / "unet" / files.WEIGHTS_NAME: (load_unet, classes / "unet"),
        classes / "judge" / "model.safetensors": (load_judge, classes / "judge"),
        single / "single.safetensors": (load_single_file, single / "single.safetensors", single),
    }
    for path, (load, *arguments) in loads.items():
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header, held = json.loads(data[8:end]), len(data) - end
        name = f"{min(set(header) - {'__metadata__'}).rpartition('.')[0]}.more"
        header[name] = {"dtype": "F32", "shape": [1 << 29], "data_offsets": [held, held + (1 << 31)]}
        text_of = json.dumps(header).encode()
        path.unlink()
        with path.open("wb") as file:
            file.write(len(text_of).to_bytes(8, "little") + text_of + data[end:])
            file.truncate(8 + len(text_of) + held + (1 << 31))
        refused(load, *arguments, about=name)


def test_a_file_larger_than_memory_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 29], "data_offsets": [0, 1 << 31]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 31))
    monkeypatch.setattr("pecker_fast.files.reading._free_bytes", lambda: 1 << 30)
    refused(files.read_tensors, path, about="2.0 GiB are to be read, 1.0 GiB of memory are free")


# --- generator=


@pytest.fixture(scope="module")
def teacher(models):
    return load_model(recipe_from(class_keys(models / "class"))).teacher


def class_keys(folder: Path, **keys) -> dict:
    return {"model": str(folder), "forget": 0, "cover": 1, "output": "unused", **keys}


def link_out(name):
    def hurt(folder: Path) -> None:
        outside = folder.parent / f"outside-{Path(name).name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return hurt


def config_of(part, **keys):
    return lambda folder: edit(folder / part / "config.json", **keys)


def more_layers(folder: Path) -> None:
    change(
        folder / "generator" / files.WEIGHTS_NAME,
        lambda held: held.update({n.replace("resnets.0.", "resnets.9."): t.clone() for n, t in held.items() if "resnets.0." in n}),
    )  # fmt: skip


def as_score(**keys):
    def hurt(folder: Path) -> None:
        shutil.copytree(folder / "generator", folder / "score")
        edit(folder / "score" / "config.json", **keys)

    return hurt


GENERATORS = {
    "another activation": (config_of("generator", act_fn="relu"), "act_fn is 'relu'"),
    "another norm": (config_of("generator", norm_eps=0.5), "norm_eps is 0.5"),
    "another embedding of time": (config_of("generator", freq_shift=3), "freq_shift is 3"),
    "another size": (config_of("generator", sample_size=16), "its samples are (1, 16, 16)"),
    "another class": (config_of("generator", _class_name="UNet2DConditionModel"), "generator"),
    "code": (config_of("generator", auto_map={"a": "b"}), "auto_map names custom code"),
    "more layers than it says": (more_layers, "resnets.9."),
    "a score of another kind": (as_score(norm_eps=0.1), "norm_eps is 0.1"),
    "links": (link_out("generator/config.json"), "leaves the model folder"),
    "an index that links out": (
        lambda f: (f / "model_index.json").symlink_to("/etc/hostname"),
        "leaves the model folder",
    ),
    "a pickle": (
        lambda f: (f / "generator" / files.WEIGHTS_NAME).write_bytes(pickle.dumps(["x" * 20])),
        "holds a pickle, whatever its name",
    ),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_is_the_teachers_own_kind(models, teacher, tmp_path, name):
    hurt, about = GENERATORS[name]
    folder = tmp_path / "start"
    shutil.copytree(models / "class" / "unet", folder / "generator")
    recipe = recipe_from(class_keys(models / "class", generator=str(folder)))
    edit(folder / "generator" / "config.json", dropout=0.1)  # which is off in training
    assert load_start(recipe, teacher)
    hurt(folder)
    refused(load_start, recipe, teacher, about=about)


# --- the index, the folder of configs, prompt files


@pytest.mark.parametrize("kind", ["class", "sd1", "single"])
def test_an_index_that_links_out_is_not_read(fresh, kind):
    from odd_folders import TEXT

    folder = fresh(kind)
    if kind == "class":
        (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    link_out("model_index.json")(folder)
    keys = (
        {"model": str(folder / "single.safetensors"), "model_config": str(folder)}
        if kind == "single"
        else {"model": str(folder)}
    )
    given = class_keys(folder) if kind == "class" else {**TEXT, "output": "unused", **keys}
    refused(load_model, recipe_from(given), about="leaves the model folder")


@pytest.mark.parametrize("entry", [8, [], ["diffusers"], "diffusers", [1, 2], None, {}])
@pytest.mark.parametrize("part", ["unet", "scheduler", "safety_checker"])
def test_an_entry_of_the_index_is_a_pair(fresh, part, entry):
    folder = fresh("sd1")
    edit(folder / "model_index.json", **{part: entry})
    refused(files.resolve_model, str(folder), about=f"{part} is ")


def test_prompts_in_a_models_folder_are_the_models(fresh, tmp_path, monkeypatch):
    """They go into the run's own files, and so must not be somebody's private ones."""
    from pecker_fast.conditions import inlined_captions

    monkeypatch.chdir(tmp_path)
    folder = fresh("sd1")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("a red circle\n")
    assert inlined_captions("retain", "texts/a.txt", [folder]) == ["a red circle"]
    link_out("texts/a.txt")(folder)
    refused(inlined_captions, "retain", "texts/a.txt", [folder], about="leaves the model folder")


def test_a_folder_of_anything_is_no_model(tmp_path):
    for number in range(10_001):
        (tmp_path / f"{number}").touch()
    with pytest.raises(ModelError, match="more than 10,000 entries"):
        files.resolve_model(str(tmp_path))
