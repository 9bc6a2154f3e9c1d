"""Model folders with one odd value or one damage each, drawn by number: case n is the same folder on every machine."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import write_tiny_model
from tiny_text_models import tiny_pipeline

MODELS = ("class", "class", "class", "class", "class", "sd1", "sd1", "sd1", "sdxl", "single")
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT = {
    "forget": {"concept": "circle", "captions": ["a red circle"]}, "cover": "square", "retain": ["a red square"],
    "batch_size": 2,
}  # fmt: skip
CLASS = {"forget": 0, "cover": 1}
NUMBERS = [
    *(-1, 0, 1, 2, 3, 5, 7, 9, 33, 100_000, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**9)),
    *(0.5, -0.5, 2.0, 1e-30, 1e30, 1e308, math.nan, math.inf, -math.inf),
]
OTHERS: list[Any] = [
    *(
        True,
        False,
        None,
        "",
        "8",
        "nan",
        "eight",
        "x" * 100_000,
        "a\0b",
        "two\nlines",
        "../../etc/passwd",
        "DownBlock2D",
    ),
    *(
        [],
        [1],
        [[1]],
        ["x"],
        [None],
        [1] * 1000,
        [8] * 3,
        [0.001] * 1000,
        [math.nan] * 1000,
        {},
        {"a": 1},
        [True, False],
    ),
]
LINKS = ("itself", "each other", "nothing", "/dev/zero", "/etc/hostname", ".", "..", "x" * 250)
TEXTS = [
    *(
        b"",
        b"null",
        b"[]",
        b"7",
        b'"text"',
        b"{",
        b"{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe{\0}\0",
        b"\0" * 64,
    ),
    *(
        b"\xef\xbb\xbf{}",
        b'{"a": 1, "a": 2}',
        b"{} trailing",
        b'{"a": ' + b"9" * 10_000 + b"}",
        b"\x80\x04\x95.",
        b'{"\xff": 1}',
    ),
]


@dataclass(frozen=True)
class Case:
    """What was done to which model; `part`: the file or folder that is damaged; `key`: of its config, or a tensor's name."""

    number: int
    model: str
    folder: Path
    part: str
    key: str
    what: str

    @property
    def recipe(self) -> dict[str, Any]:
        """Keys of a recipe over this model."""
        single = {"model": str(self.folder / "single.safetensors"), "model_config": str(self.folder)}
        model = single if self.model == "single" else {"model": str(self.folder)}
        return {**(CLASS if self.model == "class" else TEXT), **model, "output": str(self.folder / "run")}

    def __str__(self) -> str:
        return f"case {self.number} ({self.model}): {self.part}: {self.key} {self.what}"


def write_models(folder: Path) -> Path:
    """The models in order that the cases are copies of: a folder each, named as `MODELS`."""
    from pecker_fast.networks.single_file import to_single_file

    write_tiny_model(folder / "class")
    for kind in ("sd1", "sdxl"):
        tiny_pipeline(folder / kind, kind)
    _older_tokenizer(folder / "sd1" / "tokenizer")
    shutil.copytree(folder / "sd1", folder / "single")
    to_single_file(folder / "single", folder / "single" / "single.safetensors")
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / "single" / part).glob("*.safetensors"):
            file.unlink()
    return folder


def _older_tokenizer(folder: Path) -> None:
    """As models were released with: vocab.json, merges.txt and special_tokens_map.json in place of tokenizer.json."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps({**names, "unk_token": "<|endoftext|>"}))
    (folder / "tokenizer.json").unlink()


def odd_folder(models: Path, target: Path, number: int) -> Case:
    """Case `number` below `target`: hard links to the files of a model, but for the one that is damaged."""
    rng = random.Random(f"odd folder {number}")
    model = rng.choice(MODELS)
    folder = target / f"{number}"
    shutil.copytree(models / model, folder, copy_function=os.link)
    part, key, what = rng.choices(DAMAGES, weights=[weight for _, weight in _WEIGHTED])[0](rng, folder)
    return Case(number, model, folder, part, key, what)


def _pick(rng: random.Random, folder: Path, pattern: str) -> Path:
    return rng.choice(sorted(path for path in folder.rglob(pattern) if path.is_file()))


def _put(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _odd(rng: random.Random, old: Any) -> Any:
    """A value in place of `old`: odd, or a list of it with one odd element, or of another length."""
    if isinstance(old, list) and old and rng.random() < 0.6:
        place = rng.randrange(len(old))
        element = rng.choice(NUMBERS + OTHERS)
        return rng.choice(
            [[*old[:place], element, *old[place + 1 :]], old[:place] + old[place + 1 :], [*old, old[place]], old * 1000]
        )
    if isinstance(old, int) and not isinstance(old, bool) and rng.random() < 0.3:
        return rng.choice([old * 1000, old + 1, -old, float(old), str(old), [old], old * 10**9])
    return rng.choice(NUMBERS if rng.random() < 0.6 else OTHERS)


def odd_value(rng: random.Random, folder: Path) -> tuple[str, str, str]:
    found = sorted(path for path in folder.rglob("*.json") if path.name not in ("vocab.json", "tokenizer.json"))
    keys = [(path, key) for path in found for key in sorted(json.loads(path.read_text()))]
    path, key = rng.choice(keys)
    if rng.random() < 0.3:  # of a small config more often than there are keys in it
        path = rng.choice(found)
        key = rng.choice([key for other, key in keys if other == path])
    config = json.loads(path.read_text())
    config[key] = _odd(rng, config[key])
    _put(path, json.dumps(config).encode())
    return str(path.relative_to(folder)), key, f"= {json.dumps(config[key])[:80]}"


def odd_text(rng: random.Random, folder: Path) -> tuple[str, str, str]:
    path = _pick(rng, folder, "*.json")
    data = path.read_bytes()
    text = rng.choice([*TEXTS, data[: len(data) // 2], data + data, data.decode().encode("utf-16")])
    _put(path, text)
    return str(path.relative_to(folder)), "", f"holds {text[:40]!r}"


def odd_kind(rng: random.Random, folder: Path) -> tuple[str, str, str]:
    """A file that is a folder, a pipe, a link or nothing."""
    path = _pick(rng, folder, "*")
    what = rng.choice(["folder", "pipe", "missing", "empty", "secret", *LINKS])
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "empty":
        path.touch()
    elif what == "secret":
        path.write_bytes(os.urandom(64))
    elif what == "itself":
        path.symlink_to(path.name)
    elif what == "each other":
        path.symlink_to("other")
        path.with_name("other").symlink_to(path.name)
    elif what != "missing":
        path.symlink_to(what)
    return str(path.relative_to(folder)), "", f"is {what[:20]}"


def odd_part(rng: random.Random, folder: Path) -> tuple[str, str, str]:
    """A folder that is a file, a link or nothing."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_dir()))
    what = rng.choice(["missing", "file", "itself", "..", "/etc", "empty"])
    shutil.rmtree(path)
    if what == "file":
        path.write_text("{}")
    elif what == "empty":
        path.mkdir()
    elif what != "missing":
        path.symlink_to(path.name if what == "itself" else what)
    return path.name, "", f"is {what}"


def odd_shards(rng: random.Random, folder: Path) -> tuple[str, str, str]:
    path = _pick(rng, folder, "*.safetensors")
    shard = path.with_name("model-00001-of-00001.safetensors")
    path.rename(shard)
    name = rng.choice(
        [shard.name, "x" * 300 + ".safetensors", "a\0b.safetensors", "../x.safetensors", ".safetensors", "/"]
    )
    odd = rng.choice(NUMBERS + OTHERS)
    index: Any = {
        "names": {"metadata": {"total_size": odd}, "weight_map": {"conv_in.weight": name}},
        "many": {"weight_map": {f"tensor.{i}": f"{i}.safetensors" for i in range(20_000)}},
        "map": {"weight_map": odd},
        "value": {"weight_map": {"conv_in.weight": odd}},
        "top": odd,
    }[what := rng.choice(["names", "names", "many", "map", "value", "top"])]
    index_path = path.with_name(f"{path.name}.index.json")
    index_path.write_text(json.dumps(index))
    return str(index_path.relative_to(folder)), shard.name, f"{what} {json.dumps(index)[:80]}"


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def odd_header(rng: random.Random, folder: Path) -> tuple[str, str, str]:
    """A safetensors file whose header says something else of one tensor."""
    path = _pick(rng, folder, "*.safetensors")
    header, body = _read(path)
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    field = rng.choice(["dtype", "shape", "shape", "data_offsets", "name", "entry", "twice"])
    if field == "dtype":
        entry[field] = rng.choice(["F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "C64", "object", 7, None])
    elif field == "shape":
        entry[field] = rng.choice(
            [[], [0], [*entry["shape"], 1], [-1], [2**62, 2**62], [10**30], "8", [1] * 5000, [0.5]]
        )
    elif field == "data_offsets":
        entry[field] = rng.choice([[0, 0], [0, 2**62], [-1, 3], [8, 4], [0], "x", [0, 10**30]])
    elif field == "name":
        header[rng.choice(["x" * 5000, "a\0b", "", "../x", "two\nlines", "module." + name, "\u202e"])] = header.pop(
            name
        )
    elif field == "entry":
        header[name] = rng.choice(OTHERS)
    else:
        header["twice"] = entry
    text = json.dumps(header).encode()
    _put(path, len(text).to_bytes(8, "little") + text + body)
    return str(path.relative_to(folder)), name, f"{field} {json.dumps(header.get(name))[:80]}"


def odd_bytes(rng: random.Random, folder: Path) -> tuple[str, str, str]:
    path = _pick(rng, folder, "*.safetensors")
    data = bytearray(path.read_bytes())
    what = rng.choice(["cut", "longer", "cut head", "length", "flip", "flip"])
    if what == "cut":
        data = data[: rng.randrange(len(data))]
    elif what == "longer":
        data += b"\0" * 100
    elif what == "cut head":
        data = data[: rng.randrange(16)]
    elif what == "length":
        data[:8] = rng.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
    else:
        for _ in range(20):
            data[8 + rng.randrange(400)] = rng.randrange(256)
    _put(path, bytes(data))
    return str(path.relative_to(folder)), "", what


def odd_tensor(rng: random.Random, folder: Path) -> tuple[str, str, str]:
    """Well-formed weights: one tensor, or all, in another dtype or shape, not finite, left out or renamed."""
    from safetensors.torch import load_file, save

    path = _pick(rng, folder, "*.safetensors")
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    old = tensors[name]
    value = rng.choice([math.nan, math.inf, 1e38, 1e-38, 0.0])
    dtype = rng.choice([torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool, torch.float64, torch.complex64])
    what = rng.choice(["value", "dtype", "all", "empty", "shape", "missing", "extra", "larger"])
    if what == "value":
        tensors[name] = torch.full(old.shape, value).to(old.dtype)
        what += f" {value}"
    elif what in ("dtype", "all"):
        tensors |= {key: t.to(dtype) for key, t in tensors.items() if what == "all" or key == name}
        what += f" {dtype}"
    elif what == "empty":
        tensors[name] = old[:0]
    elif what == "shape":
        tensors[name] = old.reshape(-1)
    elif what == "missing":
        del tensors[name]
    elif what == "extra":
        tensors["nobody.knows"] = old.clone()
    else:
        tensors[name] = torch.cat([old, old])
    _put(path, save({key: t.contiguous() for key, t in tensors.items()}))
    return str(path.relative_to(folder)), name, what


def odd_tokenizer(rng: random.Random, folder: Path) -> tuple[str, str, str]:
    """Words and merges; of the whole tokenizer.json any value, however deep."""
    found = sorted(path for path in folder.glob("tokenizer*/*") if path.suffix in (".json", ".txt"))
    if not found:
        return odd_value(rng, folder)
    path = rng.choice(found)
    part = str(path.relative_to(folder))
    if path.suffix == ".txt":
        text = rng.choice(
            ["", "\n" * 1000, "#version: 0.2\n", "a\n", "a b c\n", "a  b\n", "zz yy\n", "x" * 10**6, "i n\n" * 1000]
        )
        _put(path, text.encode())
        return part, "", f"holds {text[:20]!r}"
    content = json.loads(path.read_text())
    if path.name == "vocab.json":
        key = rng.choice([*sorted(content), "<|endoftext|>", "<|endoftext|>", "<|startoftext|>"])
        content[key] = rng.choice([*NUMBERS, *OTHERS, len(content), len(content) + 1000])
        if rng.random() < 0.3:
            what = rng.choice(["gone", "shifted", "empty", "one"])
            content = {
                "gone": {k: v for k, v in content.items() if k != key},
                "shifted": {k: i + 1000 for i, k in enumerate(content)},
                "empty": {},
                "one": {"a": 0},
            }[what]
            key = f"{key} {what}"
    else:
        key = _odd_leaf(rng, content)
    _put(path, json.dumps(content).encode())
    return part, key, json.dumps(content)[:60]


def _odd_leaf(rng: random.Random, node: Any) -> str:
    """Go down by chance and put an odd value where it ends; returns the way."""
    way = []
    while True:
        keys: list[Any] = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        way.append(str(key))
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.85:
            node = node[key]
            continue
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = _odd(rng, node[key])
        return ".".join(way)


Damage = Callable[[random.Random, Path], tuple[str, str, str]]
_WEIGHTED: list[tuple[Damage, int]] = [
    (odd_value, 50), (odd_text, 6), (odd_kind, 8), (odd_part, 3), (odd_shards, 5), (odd_header, 8), (odd_bytes, 4),
    (odd_tensor, 8), (odd_tokenizer, 8),
]  # fmt: skip
DAMAGES = [damage for damage, _ in _WEIGHTED]
