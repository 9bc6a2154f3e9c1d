"""The only module that opens foreign files: safetensors, JSON and UTF-8 text; never a pickle, never code.

Writing is atomic: a temporary file in the same folder, fsync, one `os.replace`, fsync of the folder. Every such step
calls `fault_point` first, a hook that does nothing here and that tests replace to fail or to die at a chosen step.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pecker_fast.errors import DataError, ModelError, OutputError, PeckerError

if TYPE_CHECKING:
    from torch import Tensor

ASSETS = Path(__file__).parents[1] / "assets"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
MAX_TEXT_BYTES = 8 << 20
MAX_HEADER_BYTES = 8 << 20
_LIBRARIES = frozenset({"diffusers", "transformers"})
_MODEL_PARTS = ("", "unet", "scheduler", "judge", "generator", "score")
UNETS = ("UNet2DModel", "UNet2DConditionModel")  # the denoising networks there is an interface for
_NO_PICKLE = "pickle weights are never opened; convert them to safetensors"


def fault_point(name: str) -> None:
    """Called as `write:FILE`, `fsync:FILE`, `replace:FILE` or `unlink:FILE` before each such step; does nothing."""


def _size_of(path: Path, what: str, error: type[PeckerError]) -> int:
    """Size of a regular file in bytes; anything else (folder, pipe, device, nothing) raises `error`."""
    try:
        info = path.stat()
    except (OSError, ValueError) as reason:
        raise error(f"{path}: cannot open the {what}: {_reason(reason)}") from None
    if not stat.S_ISREG(info.st_mode):
        raise error(f"{path}: not a regular file; a {what} was expected")
    return info.st_size


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def read_text(path: str | Path, *, limit: int = MAX_TEXT_BYTES, error: type[PeckerError] = DataError) -> str:
    """The UTF-8 text of a file of at most `limit` bytes; raises `error` for everything else."""
    path = Path(path)
    size = _size_of(path, "text file", error)
    if size > limit:
        raise error(f"{path}: {size} bytes is too long for a text file here (at most {limit})")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as reason:
        raise error(f"{path}: cannot be read: {_reason(reason)}") from None
    except UnicodeDecodeError as reason:
        raise error(f"{path}: not UTF-8 text (byte {reason.start}); was a binary file given?") from None
    if "\0" in text:
        raise error(f"{path}: not text (it holds zero bytes); was a binary file given?")
    return text


def read_json(path: str | Path, *, error: type[PeckerError] = DataError) -> Any:
    """The value in a JSON file; raises `error`, with line and column, when it is damaged."""
    text = read_text(path, error=error)
    try:
        return json.loads(text)
    except json.JSONDecodeError as reason:
        raise error(f"{path}: damaged JSON, line {reason.lineno} column {reason.colno}: {reason.msg}") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: damaged JSON: {type(reason).__name__}") from None


def check_tensors(path: str | Path, *, error: type[PeckerError] = DataError) -> None:
    """Look at the first bytes of a tensor file; raises `error` unless it can be a safetensors file.

    A pickle is refused under any name, and a header larger than `MAX_HEADER_BYTES` or than the file is never parsed.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise error(f"{path}: {_NO_PICKLE}")
    size = _size_of(path, "safetensors file", error)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as reason:
        raise error(f"{path}: cannot be read: {_reason(reason)}") from None
    header = int.from_bytes(head[:8], "little")
    if len(head) == 9 and head[8:] == b"{" and header <= min(size - 8, MAX_HEADER_BYTES):
        return
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise error(f"{path}: holds a pickle, whatever its name; {_NO_PICKLE}")
    if len(head) == 9 and head[8:] == b"{" and MAX_HEADER_BYTES < header <= size - 8:
        raise error(f"{path}: safetensors header of {header} bytes is too long (at most {MAX_HEADER_BYTES})")
    raise error(f"{path}: not a safetensors file, or cut short ({size} bytes); fetch or write it again")


def read_tensors(path: str | Path, *, error: type[PeckerError] = DataError) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU, owning their memory) and metadata of a safetensors file.

    Raises `error` for a pickle under any name and for a missing, malformed or truncated file.
    """
    check_tensors(path, error=error)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            # a copy, so that a file shortened later cannot fault the process through its memory map
            return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as reason:
        text = f"{path}: damaged safetensors file: {_first_line(reason)}; fetch or write it again"
        raise error(text) from None
    except MemoryError:
        raise error(f"{path}: not enough memory to read {_size_of(Path(path), 'file', error)} bytes") from None


def _first_line(reason: BaseException) -> str:
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0][:200]


def _fsync_fd(fd: int, name: str) -> None:
    fault_point(f"fsync:{name}")
    os.fsync(fd)


def fsync_folder(path: str | Path) -> None:
    """Make the entries of a folder durable; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fsync_fd(fd, Path(path).name)
    finally:
        os.close(fd)


def replace(source: str | Path, target: str | Path) -> None:
    """`os.replace` of a file or folder, then fsync of the folder that holds `target`; raises OSError."""
    fault_point(f"replace:{Path(target).name}")
    os.replace(source, target)
    fsync_folder(Path(target).parent)


def replace_folder(source: str | Path, target: str | Path) -> None:
    """Put folder `source` in the place of `target`, which stays (or comes back) if that fails; raises OSError."""
    target = Path(target)
    if not target.exists():
        replace(source, target)
        return
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    os.replace(target, old)
    try:
        replace(source, target)
    except BaseException:
        if not target.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder to fill, which takes the place of `target` at the end of the block, or is gone if that fails.

    Raises OutputError, with what was at `target` before intact.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
    with output_errors(target):
        try:
            yield temporary
            replace_folder(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove(path: str | Path) -> None:
    """Delete one file; raises OSError."""
    fault_point(f"unlink:{Path(path).name}")
    os.unlink(path)


@contextlib.contextmanager
def output_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError inside the block into an OutputError naming `path` and the remedy."""
    try:
        yield
    except OSError as reason:
        full = reason.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free some space and try again" if full else "; choose another output folder"
        raise OutputError(f"{path}: cannot write: {_reason(reason)}{hint}") from None


def _write_atomic(path: str | Path, fill: Callable[[BinaryIO], None]) -> None:
    path = Path(path)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
        try:
            with temporary.open("xb") as file:
                fault_point(f"write:{path.name}")
                fill(file)
                file.flush()
                _fsync_fd(file.fileno(), path.name)
            replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                if temporary.exists():
                    remove(temporary)
            raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically, making parent folders; raises OutputError and leaves nothing behind."""

    def fill(file: BinaryIO) -> None:
        file.write(data)

    _write_atomic(path, fill)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically, making parent folders; raises OutputError and leaves nothing behind."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, obj: Any) -> None:
    """Write a value as indented JSON, atomically; raises OutputError."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically, making parent folders; raises OutputError and leaves nothing behind.

    Equal input gives equal bytes: safetensors' own writer orders the metadata by chance and leaves no place for fsync,
    so the file (8 bytes of header length, JSON header, raw bytes) is laid out here. Tensors are written one at a time.
    """
    from safetensors.torch import _TYPES

    names = {dtype: name for name, dtype in _TYPES.items()}
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # widest first keeps all aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for key in order:
        tensor, end = tensors[key], offset + tensors[key].numel() * tensors[key].element_size()
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def fill(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(_tensor_bytes(tensors[key]))

    _write_atomic(path, fill)


def _tensor_bytes(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def sha256_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hex sha256 over name, dtype, shape and bytes of each tensor, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_tensor_bytes(tensor))
    return digest.hexdigest()


def sha256_file(path: str | Path, *, error: type[PeckerError] = DataError) -> str:
    """Hex sha256 of a file's bytes; raises `error` when it cannot be read."""
    _size_of(Path(path), "file", error)
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as reason:
        raise error(f"{path}: cannot be read: {_reason(reason)}") from None


def shipped_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.name for path in ASSETS.iterdir() if path.is_dir()) if ASSETS.is_dir() else []


def resolve_model(name: str, revision: str | None = None) -> Path:
    """Folder or single file of a model: a shipped name, else a local path, else (owner/name) fetched from the Hugging Face hub.

    revision: commit, branch or tag of a hub model. Only configs, tokenizers and safetensors of a diffusers folder are ever
    fetched. Raises ModelError when there is nothing of that name.
    """
    if name in shipped_models():
        return ASSETS / name
    path = Path(name or "(empty name)")
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as reason:
        raise ModelError(f"{name[:80]}: not a folder name: {_reason(reason)}") from None
    if is_hub_name(name):
        return _from_hub(name, revision)
    shipped = ", ".join(shipped_models()) or "none"
    if path.suffix == "" and len(path.parts) > 1:
        shipped += "; `pecker-fast pretrain` makes others"
    raise ModelError(f"{name}: no such model folder; shipped models: {shipped}")


def is_hub_name(name: str) -> bool:
    """Whether a model's name is one of the hub (owner/name), and no local path or shipped name."""
    path = Path(name)
    local = name in shipped_models() or path.exists() or _local_owner(path)
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and ".." not in name and not local


def _local_owner(path: Path) -> bool:
    return path.parts[0] == "runs" or Path(path.parts[0]).is_dir()


def revision_of(folder: Path) -> str | None:
    """Commit of a model folder in the hub's cache (snapshots/COMMIT); None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    # of the weights at the top a diffusers folder has no need (single files of many gigabytes lie there); variants neither
    wanted = ["*.json", "*/*.json", "*/*.txt", "diffusion_pytorch_model*.safetensors", "*/*.safetensors"]
    unwanted = ["*.fp16.safetensors", "*.non_ema.safetensors", "*.bf16.safetensors", "safety_checker/*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as reason:  # the client raises a wide family: HTTP, cache, offline, validation
        why = f"{type(reason).__name__}: {_first_line(reason)}"
        raise ModelError(
            f"{name}: no such local folder, and the Hugging Face hub did not give it ({why}); "
            f"give a local folder or a shipped model ({', '.join(shipped_models())})"
        ) from None


def check_model_folder(path: str | Path) -> Path:
    """The folder inside `path` that holds the UNet's config.json and safetensors weights.

    Raises ModelError, naming file and remedy, for a folder that is missing or damaged, holds only pickles, is no
    UNet2DModel, names code of its own, or whose links or file names lead out of it. Nothing but JSON is read.
    """
    root = Path(path)
    if root.is_file():
        raise ModelError(f"{root}: {_NO_PICKLE if root.suffix in PICKLE_SUFFIXES else 'a model folder was expected'}")
    if not root.is_dir():
        raise ModelError(f"{root}: no such model folder; shipped models: {', '.join(shipped_models()) or 'none'}")
    check_parts(root, _MODEL_PARTS)
    unet = root / "unet" if (root / "unet").is_dir() else root
    if not (unet / CONFIG_NAME).is_file():
        raise ModelError(f"{root}: no unet/{CONFIG_NAME} or {CONFIG_NAME} in this model folder")
    name = read_json(unet / CONFIG_NAME, error=ModelError).get("_class_name")
    if name not in UNETS:
        raise ModelError(f"{unet / CONFIG_NAME}: _class_name is {name!r}; only {' and '.join(UNETS)} are supported")
    for file in weight_files(unet):
        check_tensors(file, error=ModelError)
    return unet


def check_parts(root: Path, parts: Iterable[str]) -> None:
    """Raises ModelError where a part of a model folder links out of it or names code."""
    for part in parts:
        _check_part(root / part, root)


def _check_part(folder: Path, root: Path) -> None:
    """Links of one folder stay inside the model, its JSON files name no code."""
    if not folder.is_dir():
        return
    home = root.resolve()
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        home = home.parent.parent  # the hub's cache: snapshots/REVISION holds links to ../../blobs
    try:
        entries = sorted(folder.iterdir())
    except OSError as reason:
        raise ModelError(f"{folder}: cannot be read: {_reason(reason)}") from None
    for entry in [folder, *entries]:
        if entry != root and not entry.resolve().is_relative_to(home):
            raise ModelError(f"{entry}: a link that leaves the model folder; copy the file in its place")
        if entry.suffix == ".json" and entry.is_file():
            _check_config(entry, read_json(entry, error=ModelError))


def _check_config(path: Path, config: Any) -> None:
    """Refuse a JSON file of a model that names code to import."""
    if not isinstance(config, dict):
        raise ModelError(f"{path}: damaged: a JSON object was expected")
    code = next((key for key in ("auto_map", "custom_pipeline", "custom_pipelines") if config.get(key)), None)
    if code is None and not isinstance(config.get("_class_name", ""), str):
        code = "_class_name"
    for key, value in config.items():
        if isinstance(value, str) and (value.endswith(".py") or (".py" in value and "--" in value)):
            code = key
        if path.name == "model_index.json" and isinstance(value, list) and value and key[:1] != "_":
            known = len(value) == 2 and (value[0] in _LIBRARIES or value == [None, None])
            code = code if known else key
    if code is not None:
        raise ModelError(f"{path}: {code} names custom code, which is never run; use a plain diffusers model")


def weight_files(folder: str | Path, name: str = WEIGHTS_NAME) -> list[Path]:
    """Safetensors files that hold the weights of one module (`name`, or its shards in order); raises ModelError."""
    folder = Path(folder)
    if (folder / name).exists():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if index.exists():
        content = read_json(index, error=ModelError)
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ModelError(f"{index}: damaged: no weight_map of file names")
        for shard in names.values():
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ModelError(f"{index}: {shard!r} is no safetensors file of this folder; it is not followed")
            if not (folder / shard).is_file():
                raise ModelError(f"{folder / shard}: missing, although {index.name} lists it; fetch the model again")
        return [folder / name for name in sorted(set(names.values()))]
    if folder.is_dir() and any(entry.suffix.lower() in PICKLE_SUFFIXES for entry in folder.iterdir()):
        raise ModelError(f"{folder}: holds only pickle weights; {_NO_PICKLE}")
    raise ModelError(f"{folder / name}: missing; the folder holds no safetensors weights")


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """All weights of one diffusers module, shards joined; raises ModelError."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        weights.update(read_tensors(file, error=ModelError)[0])
    return weights
