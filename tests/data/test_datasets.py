"""Readers of the data sets on synthetic files: right pixels and labels, and one clear line for each malformed input."""

import gzip
import io
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pecker_fast.data import datasets as data
from pecker_fast.errors import DataError

RNG = np.random.default_rng(0)


def cifar_records(n: int) -> tuple[np.ndarray, np.ndarray, bytes]:
    labels = RNG.integers(0, 10, n, dtype=np.uint8)
    images = RNG.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    return images, labels, b"".join(bytes([y]) + x.tobytes() for x, y in zip(images, labels))


def cifar_files(per_file: int = 3) -> tuple[np.ndarray, np.ndarray, dict[str, bytes]]:
    parts = [cifar_records(per_file) for _ in range(6)]
    files = dict(zip((*data.CIFAR_TRAIN, *data.CIFAR_TEST), (part[2] for part in parts)))
    return np.stack([part[0] for part in parts]), np.stack([part[1] for part in parts]), files


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes], inside: str = "cifar-10-batches-bin") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"batches.meta.txt": b"airplane\n", **files}.items():
            member = tarfile.TarInfo(f"{inside}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def check_cifar(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    train, test = data.cifar10(path), data.cifar10(path, train=False)
    assert (train.split, test.split) == ("train", "test")
    assert torch.equal(train.images, torch.from_numpy(images[:5].reshape(-1, 3, 32, 32)))
    assert torch.equal(train.labels, torch.from_numpy(labels[:5].reshape(-1).astype(np.int64)))
    assert torch.equal(test.images, torch.from_numpy(images[5]))
    assert train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64


def one_line(error: pytest.ExceptionInfo[DataError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_digits_are_scaled_and_complete() -> None:
    digits = data.digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.float32
    assert (digits.images.min(), digits.images.max()) == (-1, 1)
    assert digits.labels.bincount().min() >= 174
    assert (digits.num_classes, digits.channels, digits.sample_size, len(digits)) == (10, 1, 8, 1797)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError) as error:
        data.digits()
    one_line(error, "scikit-learn", "pecker-fast[eval]")


def test_one_door_for_all_readers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def closed(*args: object, **kwargs: object) -> None:
        raise AssertionError("a data set was opened")

    monkeypatch.setattr(data, "open_data", closed)
    for read in (data.digits, lambda: data.cifar10(tmp_path), lambda: data.stl10(tmp_path)):
        with pytest.raises(AssertionError, match="opened"):
            read()
    with pytest.raises(AssertionError, match="opened"):
        data.image_folder(tmp_path)


def test_held_out_split_is_disjoint_and_seeded() -> None:
    digits = data.digits()
    train, test = digits.held_out(0.2, seed=3)
    assert len(test) == 359
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(1797))
    assert torch.equal(test, digits.held_out(0.2, seed=3)[1])
    assert not torch.equal(test, digits.held_out(0.2, seed=4)[1])


@pytest.mark.parametrize("nested", [False, True])
def test_cifar_folder(tmp_path: Path, nested: bool) -> None:
    images, labels, files = cifar_files()
    write_folder(tmp_path / "cifar-10-batches-bin" if nested else tmp_path, files)
    check_cifar(tmp_path, images, labels)


def test_cifar_archive_is_read_without_unpacking(tmp_path: Path) -> None:
    images, labels, files = cifar_files()
    path = write_tar(tmp_path / "cifar-10-binary.tar.gz", files)
    check_cifar(path, images, labels)
    assert list(tmp_path.iterdir()) == [path]


def test_uint8_batches_are_scaled(tmp_path: Path) -> None:
    images, _, files = cifar_files()
    batch = data.cifar10(write_folder(tmp_path, files)).batch(torch.tensor([4, 0]))
    truth = torch.from_numpy(images[:5].reshape(-1, 3, 32, 32)[[4, 0]]).double() / 127.5 - 1
    assert batch.dtype == torch.float32
    assert (batch - truth).abs().max() < 1e-6


def test_cifar_for_python_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {"data_batch_1": b"\x80\x02", "batches.meta": b"\x80\x02"})
    archive = write_tar(tmp_path / "cifar-10-python.tar.gz", {"data_batch_1": b"\x80\x02"}, "cifar-10-batches-py")
    for path in (folder, archive):
        with pytest.raises(DataError) as error:
            data.cifar10(path)
        one_line(error, "pickles", "binary distribution", str(path))
        assert str(error.value).count(str(path)) == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_batch_2.bin": None}, "data_batch_2.bin is missing"),
        ({"data_batch_2.bin": b""}, "0 bytes"),
        ({"data_batch_2.bin": b"\x01" * 3074}, "3074 bytes, not a multiple of 3073"),
        ({"data_batch_2.bin": b"\x0a" + bytes(3072)}, "label 10 is out of range"),
    ],
)
def test_malformed_cifar(tmp_path: Path, change: dict[str, bytes | None], words: str, packed: bool) -> None:
    files = {k: v for k, v in {**cifar_files()[2], **change}.items() if v is not None}
    path = write_tar(tmp_path / "c.tar.gz", files) if packed else write_folder(tmp_path / "c", files)
    with pytest.raises(DataError) as error:
        data.cifar10(path)
    one_line(error, words, str(path))


def test_oversized_cifar_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = cifar_files()[2]
    folder, archive = write_folder(tmp_path / "c", files), write_tar(tmp_path / "c.tar.gz", files)
    monkeypatch.setattr(data, "CIFAR_FILE_BYTES", 2 * data.CIFAR_RECORD_BYTES)
    for path in (folder, archive):
        with pytest.raises(DataError) as error:
            data.cifar10(path)
        one_line(error, "9219 bytes", "at most 6146 expected")
    monkeypatch.undo()
    monkeypatch.setattr(data, "UNPACKED_BYTES", 20_000)
    with pytest.raises(DataError) as error:
        data.cifar10(archive)
    one_line(error, "unpacks to more", str(archive))


def test_damaged_archives(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar.gz", cifar_files(30)[2]).read_bytes()
    broken = {
        "cut.tar.gz": whole[: len(whole) // 2],
        "flipped.tar.gz": whole[:5000] + bytes(64) + whole[5064:],
        "text.tar.gz": b"not an archive",
        "empty.tar.gz": b"",
        "gz-of-text.tar.gz": gzip.compress(b"hello" * 1000),
    }
    for name, content in broken.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            data.cifar10(path)
        one_line(error, str(path))


def test_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(3073))
    path = tmp_path / "c.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in data.CIFAR_TRAIN:
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, str(secret)
            archive.addfile(member)
    with pytest.raises(DataError) as error:
        data.cifar10(path)
    one_line(error, "data_batch_1.bin is missing")


def stl_files(n: int, constant: bool = False) -> tuple[np.ndarray, dict[str, bytes]]:
    images = RNG.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8)
    if constant:
        images[:] = np.array([10, 120, 250], np.uint8)[None, :, None, None]
    columns = images.transpose(0, 1, 3, 2).tobytes()
    labels = bytes(range(1, n + 1))
    return images, {"train_X.bin": columns, "train_y.bin": labels, "test_X.bin": columns, "test_y.bin": labels}


def test_stl_is_turned_and_resized(tmp_path: Path) -> None:
    images, files = stl_files(4)
    stl = data.stl10(write_folder(tmp_path, files))
    assert stl.images.shape == (4, 3, 64, 64)
    assert stl.images.dtype == torch.uint8
    assert stl.labels.tolist() == [0, 1, 2, 3]
    for ours, source in zip(stl.images, images):  # Pillow's bilinear filter is the one of torchvision on images
        theirs = np.array(Image.fromarray(source.transpose(1, 2, 0)).resize((64, 64), Image.Resampling.BILINEAR))
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs.astype(int)).max() <= 1
    assert torch.equal(data.stl10(tmp_path, train=False).images, stl.images)


def test_stl_constant_planes_stay_constant(tmp_path: Path) -> None:
    stl = data.stl10(write_folder(tmp_path / "stl10_binary", stl_files(2, constant=True)[1]).parent)
    assert [plane.unique().tolist() for plane in stl.images[1]] == [[10], [120], [250]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_y.bin": None}, "train_y.bin is missing"),
        ({"train_X.bin": bytes(27649)}, "27649 bytes, not a multiple of 27648"),
        ({"train_X.bin": b""}, "0 bytes"),
        ({"train_y.bin": bytes([1, 2])}, "2 labels for 3 images"),
        ({"train_y.bin": bytes([1, 0, 3])}, "label 0 is out of range 1…10"),
        ({"train_y.bin": bytes([1, 11, 3])}, "label 11 is out of range 1…10"),
    ],
)
def test_malformed_stl(tmp_path: Path, change: dict[str, bytes | None], words: str) -> None:
    files = {k: v for k, v in {**stl_files(3)[1], **change}.items() if v is not None}
    with pytest.raises(DataError) as error:
        data.stl10(write_folder(tmp_path, files))
    one_line(error, words)


def test_stl_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "stl10_binary.tar.gz"
    path.write_bytes(b"x")
    with pytest.raises(DataError) as error:
        data.stl10(path)
    one_line(error, "unpack")


def save_image(path: Path, size: tuple[int, int] = (12, 12), mode: str = "RGB", value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * len(mode) if len(mode) > 1 else value).save(path)
    return path


def test_image_folder_classes_and_pixels(tmp_path: Path) -> None:
    for i, name in enumerate(["cat", "ant", "bee"]):
        save_image(tmp_path / name / "1.png", value=i)
        save_image(tmp_path / name / "0.jpg", value=100 + i)
        (tmp_path / name / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    found = data.image_folder(tmp_path)
    assert found.images.shape == (6, 3, 12, 12)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.images[1::2].flatten(1).float().mean(1).tolist() == [1, 2, 0]  # ant, bee, cat
    assert found.num_classes == 3


def test_image_folder_grey_and_resized(tmp_path: Path) -> None:
    save_image(tmp_path / "a" / "0.png", (20, 10), "L", 7)
    save_image(tmp_path / "b" / "0.png", (8, 9), "L", 9)
    found = data.image_folder(tmp_path, size=8)
    assert found.images.shape == (2, 1, 8, 8)
    assert found.images[0].unique().tolist() == [7]
    save_image(tmp_path / "b" / "1.png", (8, 8), "RGB", 9)
    assert data.image_folder(tmp_path, size=8).images.shape == (3, 3, 8, 8)


def test_forget_images_are_dealt_in_order(tmp_path: Path) -> None:
    for i in range(3):
        save_image(tmp_path / f"{i}.png", (10, 8), value=i)
    deal = data.forget_images(tmp_path, (3, 8, 8), [4])
    for index in range(3):
        images = deal(torch.tensor([4, 4]), index)
        assert images.shape == (2, 3, 8, 8)
        grey = ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        assert grey == [(2 * index) % 3, (2 * index + 1) % 3]
    assert data.forget_images(tmp_path, (1, 8, 8), [4])(torch.tensor([4]), 1).shape == (1, 1, 8, 8)


def test_forget_images_of_several_classes(tmp_path: Path) -> None:
    for label in (2, 7, 9):
        save_image(tmp_path / str(label) / "0.png", (8, 8), "L", label)
    deal = data.forget_images(tmp_path, (3, 8, 8), [7, 2])
    assert ((deal(torch.tensor([7, 2, 7]), 5)[:, :, 0, 0] + 1) * 127.5).round().tolist() == [[7] * 3, [2] * 3, [7] * 3]
    with pytest.raises(DataError, match="missing; expected a subfolder for each of the classes 7, 3"):
        data.forget_images(tmp_path, (3, 8, 8), [7, 3])
    with pytest.raises(DataError, match="without a PNG"):
        data.forget_images(tmp_path, (3, 8, 8), [3])
    with pytest.raises(DataError, match="4×8×8"):
        data.forget_images(tmp_path, (4, 8, 8), [7])


def test_malformed_image_folders(tmp_path: Path) -> None:
    save_image(tmp_path / "a" / "0.png")
    with pytest.raises(DataError, match="1 class subfolders"):
        data.image_folder(tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="without a PNG or JPEG"):
        data.image_folder(tmp_path)
    save_image(tmp_path / "b" / "0.png", (14, 14))
    with pytest.raises(DataError, match="14×14 pixels, squares of one size"):
        data.image_folder(tmp_path)
    with pytest.raises(DataError, match="positive"):
        data.image_folder(tmp_path, size=0)
    bad = tmp_path / "b" / "1.png"
    for content in (b"no image", save_image(tmp_path / "x.png").read_bytes()[:40], b"GIF89a" + bytes(20)):
        bad.write_bytes(content)
        with pytest.raises(DataError) as error:
            data.image_folder(tmp_path, size=12)
        one_line(error, str(bad))
    Image.new("I;16", (12, 12)).save(bad)
    with pytest.raises(DataError, match="8 bits"):
        data.image_folder(tmp_path)


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8000, 8000, 8, 0, 0, 0, 0))
    save_image(tmp_path / "a" / "0.png")
    save_image(tmp_path / "b" / "0.png")
    (tmp_path / "b" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(DataError, match="8000×8000 pixels, more than"):
        data.image_folder(tmp_path, size=12)
    (tmp_path / "b" / "1.png").unlink()
    monkeypatch.setattr(data, "DATASET_BYTES", 100)
    with pytest.raises(DataError, match="at most 100"):
        data.image_folder(tmp_path)


def test_paths_and_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown data set 'mnist'"):
        data.open_data("mnist")
    with pytest.raises(DataError, match="needs a path: nothing is downloaded"):
        data.open_data("cifar10")
    for name in ("cifar10", "stl10", "images"):
        with pytest.raises(DataError, match="no such file or folder"):
            data.open_data(name, tmp_path / "nothing")
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(DataError, match="not a folder"):
        data.image_folder(file)
