"""Folders of the user's own images: by class, with captions in a table or beside them, and what is wrong with a folder."""

import json

import pytest
from PIL import Image

from pecker_fast.data import captioned_images, class_images
from pecker_fast.errors import DataError

GREY = {"a.png": 10, "b.png": 90, "c.png": 200}


def write(folder, names=GREY, size=16):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (size, size), (GREY.get(name, 40),) * 3).save(folder / name)
    return folder


def test_classes_are_found_by_number_and_by_name(tmp_path):
    write(tmp_path / "2", ["a.png"])
    write(tmp_path / "cat", ["b.png", "c.png"])
    data = class_images(tmp_path, 8, [0, 1, 2], None, ["dog", "cat", "bird"])
    assert sorted(data.labels.tolist()) == [1, 1, 2]
    assert data.images.shape == (3, 3, 8, 8) or data.images.shape == (3, 1, 8, 8)
    value = {label: int(data.images[data.labels == label][0, 0, 0, 0]) for label in (1, 2)}
    assert value == {1: 90, 2: 10}


def test_a_folder_without_subfolders_is_of_the_one_class(tmp_path):
    data = class_images(write(tmp_path / "flat"), 8, [0, 1], 1)
    assert data.labels.tolist() == [1, 1, 1]
    with pytest.raises(DataError, match="no subfolder for any of the classes 0, 1; name one"):
        class_images(tmp_path / "flat", 8, [0, 1], None)
    with pytest.raises(DataError, match="no such folder of images; images is pool, trajectory or a folder"):
        class_images(tmp_path / "none", 8, [0, 1], None)


def jsonl(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


@pytest.mark.parametrize("form", ["jsonl", "csv", "txt", "caption"])
def test_captions_of_every_form_stand_beside_their_images(tmp_path, form):
    folder = write(tmp_path / "images")
    said = {name: f"a picture, number {value}" for name, value in GREY.items()}
    if form == "jsonl":
        jsonl(folder, [{"file_name": name, "text": text, "more": 1} for name, text in reversed(said.items())])
    elif form == "csv":
        (folder / "metadata.csv").write_text(
            "text,file_name\n" + "".join(f'"{text}",{name}\n' for name, text in said.items())
        )
    else:
        for name, text in said.items():
            (folder / name).with_suffix(f".{form}").write_text(text + "\n", encoding="utf-8-sig")
    data, captions = captioned_images(folder, 8)
    assert [f"a picture, number {int(image[0, 0, 0])}" for image in data.images] == captions


def test_a_folder_may_have_no_captions(tmp_path):
    data, captions = captioned_images(write(tmp_path / "images"), 8)
    assert captions is None
    assert len(data) == 3


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"file_name": "a.png", "text": "x"}], "b.png: has no caption in metadata.jsonl, others have"),
        ([{"file_name": "../a.png", "text": "x"}], "metadata.jsonl, line 1: '../a.png' is no image beside it"),
        ([{"file_name": "a.png", "text": "x"}, {"file_name": "z.png", "text": "x"}], "line 2: 'z.png' is no image"),
        ([{"file_name": "a.png"}], "line 1: a file_name and a text are needed"),
        (["a.png"], "line 1: not a JSON object"),
    ],
)
def test_what_is_wrong_with_captions_is_one_line(tmp_path, rows, says):
    folder = write(tmp_path / "images")
    jsonl(folder, rows)
    with pytest.raises(DataError) as caught:
        captioned_images(folder, 8)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_captions_beside_some_images_alone(tmp_path):
    folder = write(tmp_path / "images")
    (folder / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"b\.png: has no caption beside it, others have; give it one"):
        captioned_images(folder, 8)
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 text"):
        captioned_images(folder, 8)
