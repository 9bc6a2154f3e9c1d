"""Data sets, for `pretrain`, and for forgetting only where the user names images of their own (`mask.data=PATH`,
`images=PATH`).

Every reader goes through `open_data`, so a single replaced function proves that no data set was touched. Nothing is
downloaded: the user names a file or a folder. Whatever is wrong with it raises `DataError`.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pecker_fast.data.class_folders import class_folders, class_names, image_files
from pecker_fast.data.image_file import header, upright_on_white, with_image
from pecker_fast.errors import DataError

NAMES = ("digits", "cifar10", "stl10", "images")

CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32  # label, then the red, green and blue plane, row-major
CIFAR_FILE_BYTES = 10_000 * CIFAR_RECORD_BYTES
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = ("test_batch.bin",)
STL_IMAGE_BYTES = 3 * 96 * 96
STL_FILE_BYTES = 100_000 * STL_IMAGE_BYTES  # the largest file of the distribution, `unlabeled_X.bin`
STL_SIZE = 64

UNPACKED_BYTES = 1 << 28  # the whole CIFAR-10 archive unpacks to 184 MB
DATASET_BYTES = 1 << 33  # of all decoded images together


@dataclass(frozen=True)
class Dataset:
    """Labelled images in memory.

    images: `[N, C, H, W]`, float32 in [-1, 1], or uint8 in [0, 255] for the large sets.
    labels: int64 `[N]` in [0, `num_classes`).
    split: "train", "test", or "all" where the source has no split of its own.
    class_names: what the classes are called, by number; None where nothing names them.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    name: str
    split: str
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def sample_size(self) -> int:
        """Height and width in pixels."""
        return self.images.shape[-1]

    def batch(self, index: Tensor | slice) -> Tensor:
        """The chosen images as float32 `[n, C, H, W]` in [-1, 1]."""
        images = self.images[index]
        return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images

    def without(self, classes: Sequence[int]) -> Dataset:
        """The same data set, as many classes, without an image of some of them."""
        if not classes:
            return self
        keep = ~torch.isin(self.labels, torch.tensor(list(classes)))
        return replace(self, images=self.images[keep], labels=self.labels[keep])

    def held_out(self, share: float, seed: int) -> tuple[Tensor, Tensor]:
        """Indices (int64) of a seeded random split: the part to train on, and the `share` to judge on."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        cut = round(len(self) * share)
        return order[cut:], order[:cut]

    def sha256(self) -> str:
        """Hash of pixels and labels, to record which data a model has seen."""
        digest = hashlib.sha256(self.images.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def open_data(
    name: str,
    path: str | Path | None = None,
    train: bool = True,
    size: int | None = None,
    classes: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Dataset:
    """Read a data set: the one door to all of them.

    name: "digits", "cifar10", "stl10" or "images".
    path: file or folder; unused by the digits, which scikit-learn brings along.
    train: the training split, else the test split (digits and image folders have one split).
    size: pixels that image folders are resized to; None keeps the files' own size.
    classes: only these, read from subfolders named by number (image folders alone); None = every subfolder is one.
    names: with `classes`, what the model's classes are called: their subfolders have these names.

    Raises `DataError`: unknown name, missing path, or a file that is not what it should be.
    """
    if name not in NAMES:
        raise DataError(f"unknown data set {name!r}; choose one of {', '.join(NAMES)}")
    if name == "digits":
        return _read_digits()
    if path is None:
        raise DataError(f"{name} needs a path: nothing is downloaded, so name a local copy")
    source = Path(path)
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    try:
        if name == "cifar10":
            return _read_cifar10(source, train)
        if name == "stl10":
            return _read_stl10(source, train)
        return _read_image_folder(source, size, classes, names)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror or error}") from error


def digits() -> Dataset:
    """scikit-learn's digits: 1,797 grey images of 8×8 pixels, ten classes, float32 in [-1, 1].

    Raises `DataError` where scikit-learn is missing.
    """
    return open_data("digits")


def cifar10(path: str | Path, train: bool = True) -> Dataset:
    """CIFAR-10's binary distribution: uint8 `[N, 3, 32, 32]`.

    path: `cifar-10-binary.tar.gz`, or a folder that holds `data_batch_1.bin` … `test_batch.bin`. The archive is read
    in place, nothing is unpacked. Layout: https://www.cs.toronto.edu/~kriz/cifar.html
    Raises `DataError`; the distribution for Python holds pickles and is refused.
    """
    return open_data("cifar10", path, train=train)


def stl10(path: str | Path, train: bool = True) -> Dataset:
    """STL-10's binary distribution, resized from 96×96 to 64×64 (antialiased bilinear): uint8 `[N, 3, 64, 64]`.

    path: a folder that holds `train_X.bin` and `train_y.bin` (or `test_…`). Pixels are stored column by column, labels
    count from 1: https://cs.stanford.edu/~acoates/stl10
    """
    return open_data("stl10", path, train=train)


def image_folder(path: str | Path, size: int | None = None) -> Dataset:
    """PNG, JPEG, WebP and BMP files in one subfolder a class, in natural order (10 after 2): uint8 `[N, C, H, W]`.

    Hidden files, ._*, Thumbs.db, __MACOSX and the like are passed over. Images are turned as their EXIF data say, what is
    transparent becomes white. C is 1 where every file is grey, else 3. With `size`, the centre square is resized to it (antialiased
    bilinear); without, all files must be squares of one size.
    """
    return open_data("images", path, size=size)


def forget_images(
    path: str | Path, shape: tuple[int, int, int], classes: Sequence[int], names: Sequence[str] | None = None
) -> Callable[[Tensor, int], Tensor]:
    """The user's own images of some classes, dealt in order: `(labels [N], batch index) -> float32 [N, C, H, W]`.

    path: one subfolder a class, named by its number or, where the model knows `names`, by its name; for a single class also
        a folder of images.
    shape: (C, H, W) that the model wants; images are resized, and turned grey or coloured as needed.
    Raises `DataError` for what cannot be read, and for a model whose images are no squares of 1 or 3 channels.
    """
    channels, height, width = shape
    if channels not in (1, 3) or height != width:
        raise DataError(f"{path}: images cannot be fitted to the model's samples of {channels}×{height}×{width}")
    found = open_data("images", path, size=height, classes=classes, names=names)
    images = as_channels(found.batch(slice(None)), channels)
    rows = {label: (found.labels == label).nonzero()[:, 0] for label in classes}

    def deal(labels: Tensor, index: int) -> Tensor:
        place = range(index * len(labels), (index + 1) * len(labels))
        return images[[int(rows[int(c)][i % len(rows[int(c)])]) for c, i in zip(labels, place)]]

    return deal


def as_channels(images: Tensor, channels: int) -> Tensor:
    """float32 `[N, C, H, W]` of 1 or 3 channels, turned grey or coloured where `channels` asks for the other."""
    if images.shape[1] == 3 and channels == 1:
        images = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)  # ITU-R BT.601
    return images.expand(-1, channels, -1, -1)


def _read_digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits need scikit-learn: pip install 'pecker-fast[eval]'") from error
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32)[:, None] / 8 - 1  # 17 levels of grey
    return Dataset(images, torch.tensor(source.target, dtype=torch.int64), 10, "digits", "all")


def _read_cifar10(path: Path, train: bool) -> Dataset:
    names = CIFAR_TRAIN if train else CIFAR_TEST
    parts = _cifar_folder(path, names) if path.is_dir() else _cifar_archive(path, names)
    records = []
    for name in names:
        if name not in parts:
            raise DataError(f"{path}: {name} is missing; expected CIFAR-10's binary distribution")
        if not parts[name] or len(parts[name]) % CIFAR_RECORD_BYTES:
            raise DataError(
                f"{path}: {name} has {len(parts[name])} bytes, not a multiple of {CIFAR_RECORD_BYTES}; is it cut short?"
            )
        records.append(np.frombuffer(parts[name], np.uint8).reshape(-1, CIFAR_RECORD_BYTES))
    table = np.concatenate(records)
    labels = table[:, 0].astype(np.int64)
    if labels.max() > 9:
        raise DataError(f"{path}: label {labels.max()} is out of range 0…9; is this CIFAR-10's binary distribution?")
    images = torch.from_numpy(table[:, 1:].reshape(-1, 3, 32, 32).copy())
    return Dataset(images, torch.from_numpy(labels), 10, "cifar10", "train" if train else "test")


def _refuse_pickles(path: Path) -> None:
    raise DataError(
        f"{path}: this is CIFAR-10 for Python, whose files are pickles and are not opened; "
        "use the binary distribution (cifar-10-binary.tar.gz)"
    )


def _cifar_folder(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    folder = path if (path / names[0]).is_file() else path / "cifar-10-batches-bin"
    found = {name: folder / name for name in names if (folder / name).is_file()}
    if not found and any((path / p).exists() for p in ("data_batch_1", "test_batch", "cifar-10-batches-py")):
        _refuse_pickles(path)
    return {name: _read_bytes(file, CIFAR_FILE_BYTES) for name, file in found.items()}


class _Limited:
    """A stream that stops after `limit` bytes, so that a small archive cannot unpack into endless work."""

    def __init__(self, stream: gzip.GzipFile, limit: int) -> None:
        self.stream, self.left = stream, limit

    def read(self, size: int = -1) -> bytes:
        block = self.stream.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        self.left -= len(block)
        if self.left < 0:
            raise DataError("unpacks to more than CIFAR-10 holds")
        return block


def _cifar_archive(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    parts: dict[str, bytes] = {}
    try:
        with gzip.open(path) as packed:
            stream: Any = _Limited(packed, UNPACKED_BYTES)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    if folder.endswith("cifar-10-batches-py"):
                        _refuse_pickles(path)
                    if name in names and member.isfile():
                        if member.size > CIFAR_FILE_BYTES:
                            raise DataError(f"{name} has {member.size} bytes, at most {CIFAR_FILE_BYTES} expected")
                        content = archive.extractfile(member)
                        parts[name] = content.read() if content else b""
            while stream.read(1 << 20):  # to the end, where gzip keeps the checksum
                pass
    except DataError as error:
        message = str(error)
        raise (error if message.startswith(str(path)) else DataError(f"{path}: {message}")) from None
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: not a readable .tar.gz archive ({error})") from error
    return parts


def _read_bytes(file: Path, limit: int) -> bytes:
    if file.stat().st_size > limit:
        raise DataError(f"{file}: {file.stat().st_size} bytes, at most {limit} expected")
    return file.read_bytes()


def _read_stl10(path: Path, train: bool) -> Dataset:
    if not path.is_dir():
        raise DataError(f"{path}: STL-10 is read from a folder; unpack stl10_binary.tar.gz and name that folder")
    split = "train" if train else "test"
    folder = path if (path / f"{split}_X.bin").is_file() else path / "stl10_binary"
    images_file, labels_file = folder / f"{split}_X.bin", folder / f"{split}_y.bin"
    for file in (images_file, labels_file):
        if not file.is_file():
            raise DataError(f"{path}: {file.name} is missing; expected STL-10's binary distribution")
    pixels = np.frombuffer(_read_bytes(images_file, STL_FILE_BYTES), np.uint8)
    if not len(pixels) or len(pixels) % STL_IMAGE_BYTES:
        raise DataError(
            f"{images_file}: {len(pixels)} bytes, not a multiple of {STL_IMAGE_BYTES} (3×96×96); is it cut short?"
        )
    labels = np.frombuffer(_read_bytes(labels_file, STL_FILE_BYTES), np.uint8).astype(np.int64) - 1
    columns = torch.from_numpy(pixels.reshape(-1, 3, 96, 96).copy())
    if len(labels) != len(columns):
        raise DataError(f"{labels_file}: {len(labels)} labels for {len(columns)} images")
    if labels.min() < 0 or labels.max() > 9:
        bad = labels[(labels < 0) | (labels > 9)][0] + 1
        raise DataError(f"{labels_file}: label {bad} is out of range 1…10")
    images = torch.cat([_resize(part.transpose(2, 3), STL_SIZE) for part in columns.split(500)])
    return Dataset(images, torch.from_numpy(labels), 10, "stl10", split)


def _resize(images: Tensor, size: int) -> Tensor:
    """uint8 `[N, C, H, W]` to uint8 `[N, C, size, size]`: the centre square, antialiased bilinear."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[:, :, top : top + side, left : left + side]
    if side == size:
        return square
    scaled = F.interpolate(square.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return scaled.round_().clamp_(0, 255).to(torch.uint8)


def _read_image_folder(
    path: Path, size: int | None, classes: Sequence[int] | None, names: Sequence[str] | None
) -> Dataset:
    if not path.is_dir():
        raise DataError(f"{path}: not a folder; expected one subfolder of images a class")
    if size is not None and size < 1:
        raise DataError(f"size {size}: a positive number of pixels expected")
    found = tuple(class_names(path)) if classes is None else None
    if found is not None:
        folders = [(path / name, label) for label, name in enumerate(found)]
    else:
        folders = class_folders(path, classes or (), names)
    files = [(file, label) for folder, label in folders for file in image_files(folder)]
    labels = torch.tensor([label for _, label in files])
    count = 1 + max(label for _, label in folders)
    return Dataset(_decode(path, [file for file, _ in files], size), labels, count, "images", "all", found)


def _decode(path: Path, files: list[Path], size: int | None) -> Tensor:
    """The files as uint8 `[N, C, size, size]`, C = 1 where all are grey, else 3."""
    headers = [with_image(file, header) for file in files]
    mode = "L" if all(kind in ("1", "L", "LA") for _, kind in headers) else "RGB"
    if size is None:
        size = headers[0][0][0]
        for file, (extent, _) in zip(files, headers):
            if extent != (size, size):
                raise DataError(
                    f"{file}: {extent[0]}×{extent[1]} pixels, squares of one size expected ({size}×{size} from the "
                    "first image); give a size to resize to"
                )
    total_bytes = len(files) * len(mode) * size * size
    if total_bytes > DATASET_BYTES:
        raise DataError(f"{path}: {total_bytes} bytes of pixels, at most {DATASET_BYTES}; give a smaller size")
    images = torch.empty(len(files), len(mode), size, size, dtype=torch.uint8)
    for i, file in enumerate(files):
        pixels = with_image(file, lambda image: np.array(upright_on_white(image).convert(mode)))
        images[i] = _resize(torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)[None], size)[0]
    return images
