"""Folders of images as people have them: numbered one way everywhere, with what programs leave behind, in all common formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pecker_fast.data import datasets as data
from pecker_fast.errors import DataError
from pecker_fast.pretrain.progress import say_classes


def levels(folder: Path, names: list[str], suffix: str = "png") -> Path:
    """A folder of classes: the i-th of `names` holds one image of grey level 10 i."""
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("L", (8, 8), 10 * i).save(folder / name / f"0.{suffix}")
    return folder


def learned(found: data.Dataset) -> list[int]:
    """The grey level / 10 of each class, in the order of their numbers."""
    return [round(float(image.float().mean()) / 10) for image in found.images[found.labels.argsort()]]


def dealt(path: Path, classes: list[int], names: list[str] | None = None) -> list[int]:
    images = data.forget_images(path, (1, 8, 8), classes, names)(torch.tensor(classes), 0)
    return ((images.mean((1, 2, 3)) + 1) * 127.5 / 10).round().int().tolist()


def test_numbers_are_their_own_class_in_training_and_in_masks(tmp_path: Path) -> None:
    folder = levels(tmp_path / "a", [str(n) for n in range(12)])
    found = data.image_folder(folder)
    assert learned(found) == list(range(12))
    assert found.class_names == tuple(str(n) for n in range(12))
    assert dealt(folder, [2, 10]) == [2, 10] == dealt(folder, [2, 10], list(found.class_names))
    padded = levels(tmp_path / "b", [f"{n:02}" for n in range(12)])
    assert learned(data.image_folder(padded)) == list(range(12))
    assert dealt(padded, [2, 10]) == [2, 10]


def test_names_are_in_natural_order_and_the_models_own_order_counts(tmp_path: Path) -> None:
    names = ["img2", "img10", "img1", "apple", "7", "10"]
    folder = levels(tmp_path / "a", names)
    found = data.image_folder(folder)
    assert found.class_names == ("7", "10", "apple", "img1", "img2", "img10")
    assert learned(found) == [4, 5, 3, 2, 0, 1]
    for label, name in enumerate(found.class_names):
        assert dealt(folder, [label], list(found.class_names)) == [names.index(name)]
    # from 1: folder "1" is class 0, in training and in the mask of a model that knows so
    one = levels(tmp_path / "b", ["1", "2", "3"])
    assert dealt(one, [0, 1], list(data.image_folder(one).class_names or ())) == [0, 1]
    assert dealt(one, [1, 2]) == [0, 1]
    # names without numbers in them: numbers serve too
    assert dealt(levels(tmp_path / "c", ["0", "1"]), [1, 0], ["cat", "dog"]) == [1, 0]
    with pytest.raises(DataError, match=r"/1 \(dog\): missing; expected a subfolder for each of the classes 0, 1"):
        dealt(levels(tmp_path / "d", ["cat", "x"]), [0, 1], ["cat", "dog"])


def test_what_systems_and_programs_leave_behind_is_passed_over(tmp_path: Path) -> None:
    folder = levels(tmp_path, ["cat", "dog"])
    for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir", ".thumbnails"):
        (folder / name).mkdir()
        (folder / "cat" / name).mkdir()
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg"):
        (folder / "cat" / name).write_bytes(b"\0\5\26\7 no image")
        (folder / name).write_bytes(b"\0\5\26\7 no image")
    found = data.image_folder(folder)
    assert (len(found), found.num_classes, found.class_names) == (2, 2, ("cat", "dog"))
    assert dealt(folder, [0, 1], ["cat", "dog"]) == [0, 1]
    assert dealt(folder / "dog", [1]) == [1]


@pytest.mark.parametrize("suffix", ["PNG", "JPG", "jpeg", "jpe", "webp", "bmp", "WebP"])
def test_common_formats_are_read(tmp_path: Path, suffix: str) -> None:
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (200 * i, 90, 30)).save(tmp_path / name / f"x.{suffix}")
    found = data.image_folder(tmp_path)
    assert found.images.shape == (2, 3, 8, 8)
    assert np.abs(found.images.float().mean((2, 3)).numpy() - [[0, 90, 30], [200, 90, 30]]).max() < 4


@pytest.mark.parametrize("suffix", ["gif", "TIFF", "heic"])
def test_an_image_that_is_not_read_is_named(tmp_path: Path, suffix: str) -> None:
    levels(tmp_path, ["a", "b"])
    (tmp_path / "b" / f"photo.{suffix}").write_bytes(b"x")
    with pytest.raises(DataError, match=rf"b/photo.{suffix}: .{suffix} images are not read; convert it to PNG"):
        data.image_folder(tmp_path)


def test_transparent_palette_and_turned_images(tmp_path: Path) -> None:
    levels(tmp_path, ["a", "b"])
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    clear.putpixel((0, 0), (0, 0, 0, 0))
    clear.save(tmp_path / "a" / "1.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([5, 6, 7, 8, 9, 10])
    palette.save(tmp_path / "a" / "2.png", transparency=1)
    turned = Image.new("RGB", (8, 16), (0, 0, 0))
    turned.paste((255, 255, 255), (0, 0, 8, 8))  # white above black: shown on its side, white to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "b" / "1.png", exif=exif)
    images = data.image_folder(tmp_path, size=8).images
    assert images[1][:, 0, 0].tolist() == [255, 255, 255]
    assert images[1][:, 5, 5].tolist() == [10, 20, 30]
    assert images[2][:, 3, 3].tolist() == [5, 6, 7]
    assert images[4][0, 4, [1, 6]].tolist() == [0, 255]
    (tmp_path / "b" / "1.png").unlink()
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "b" / "0.png")
    for name in ("1.png", "2.png"):
        (tmp_path / "a" / name).unlink()
    images = data.image_folder(tmp_path).images
    assert images.shape == (2, 1, 8, 8)
    assert images[1].unique().tolist() == [255]


def test_classes_are_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say_classes([f"c{i}" for i in range(25)])
    text = capsys.readouterr().err
    assert text.startswith("classes: 0 = c0, 1 = c1, ")
    assert text.endswith("19 = c19 and 5 more (class_names in model.json)\n")
