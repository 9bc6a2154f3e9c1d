"""Folders deleted, replaced and copied: at every step, whether it fails or the process dies there, old or new stands whole."""

import pytest
from disk_faults import failing, killed, steps_of

from pecker_fast import files
from pecker_fast.errors import OutputError
from pecker_fast.files import trees, writing

OLD, NEW = {"unet/weights": "old", "model.json": "old"}, {"unet/weights": "new", "model.json": "new", "extra": "new"}


def grow(folder, content):
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content_of(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def put_new(target):
    with files.whole_folder(target) as temporary:
        for name, text in NEW.items():
            files.write_text(temporary / name, text)


@pytest.mark.parametrize("end", [failing, killed])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole_at_every_step(tmp_path, monkeypatch, end, exchange):
    if not exchange:
        monkeypatch.setattr(trees, "_exchanged", lambda a, b: False)
    grow(tmp_path / "count" / "out", OLD)
    steps = steps_of(lambda: put_new(tmp_path / "count" / "out"), monkeypatch)
    assert steps[0] == "mkdir:out"
    assert steps.count("replace:out") == (1 if exchange else 2)
    assert {name.partition(":")[0] for name in steps} == {"mkdir", "write", "fsync", "replace", "unlink", "rmdir"}
    for at in range(len(steps)):
        home = tmp_path / f"{at}"
        grow(home / "out", OLD)
        end(lambda home=home: put_new(home / "out"), at, monkeypatch)
        aside = [p for p in home.iterdir() if p.name.startswith(".out.old-")]
        if exchange or not aside:
            assert content_of(home / "out") in (OLD, NEW), steps[at]
        else:  # where folders cannot be exchanged there is one moment at which neither has the name
            assert content_of(aside[0]) == OLD or content_of(home / "out") == NEW, steps[at]
        put_new(home / "out")
        assert content_of(home / "out") == NEW
        assert [p.name for p in home.iterdir()] == ["out"], steps[at]


def test_a_folder_set_aside_comes_back(tmp_path):
    grow(tmp_path / ".out.old-0123abcd", OLD)
    grow(tmp_path / ".out.tmp-0123abcd", {"unet/half": "x"})
    grow(tmp_path / ".other.tmp-0123abcd", {"x": "x"})
    grow(tmp_path / ".out.tmp-mine", {"x": "x"})
    files.sweep(tmp_path, {"out"})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.tmp-0123abcd", ".out.tmp-mine", "out"]
    assert content_of(tmp_path / "out") == OLD


@pytest.mark.parametrize("end", [failing, killed])
def test_a_deleted_folder_is_gone_at_once(tmp_path, monkeypatch, end):
    def delete(home):
        files.discard(home / "step")

    grow(tmp_path / "count" / "step", OLD)
    steps = steps_of(lambda: delete(tmp_path / "count"), monkeypatch)
    assert steps[0] == "rename:step"
    for at in range(len(steps)):
        home = tmp_path / f"{at}"
        grow(home / "step", OLD)
        end(lambda home=home: delete(home), at, monkeypatch)
        if (home / "step").exists():
            assert at == 0
            assert content_of(home / "step") == OLD
        else:
            files.sweep(home)
            assert not list(home.iterdir())


def test_what_cannot_be_deleted_is_named(tmp_path, monkeypatch, capsys):
    grow(tmp_path / "step", OLD)
    failing(lambda: files.discard(tmp_path / "step"), 2, monkeypatch)
    left = next(tmp_path.iterdir())
    assert str(left) in capsys.readouterr().err
    assert not (tmp_path / "step").exists()


def test_a_folder_in_use_is_not_swept_away(tmp_path):
    with files.whole_folder(tmp_path / "out") as mine:
        grow(mine, NEW)
        put_new(tmp_path / "out")  # another process, in the meantime
        assert content_of(mine) == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_deleting_opens_read_only_folders_first(tmp_path, monkeypatch):
    """What root may delete anyway, its owner can."""
    grow(tmp_path / "tree", OLD)
    (tmp_path / "tree" / "unet").chmod(0o555)
    modes = []

    def point(name):
        if name == "unlink:weights":
            modes.append(next(tmp_path.rglob("unet")).stat().st_mode & 0o777)

    monkeypatch.setattr(writing, "fault_point", point)
    files.remove_tree(tmp_path / "tree")
    assert modes == [0o755]


def test_links_are_deleted_and_not_followed(tmp_path):
    grow(tmp_path / "mine", OLD)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "mine")
    files.remove_tree(tmp_path / "tree")
    (tmp_path / "tree").symlink_to(tmp_path / "mine")
    files.remove_tree(tmp_path / "tree")
    assert content_of(tmp_path / "mine") == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_what_is_no_result_of_ours_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "photo.png").write_text("no picture")
    (tmp_path / "old.PNG").write_bytes(b"\x89PNG\r\n\x1a\n...")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    assert files.check_picture(tmp_path / "old.PNG") == tmp_path / "old.PNG"
    assert files.check_picture(tmp_path / "deep" / "new.png").name == "new.png"
    for name, match in (
        ("notes.txt", "ends in .png"),
        ("grid", "ends in .png"),
        ("photo.png", "is no PNG picture"),
        ("gone.png", "cannot be read"),
        ("", "is a folder"),
    ):
        with pytest.raises(OutputError, match=match):
            files.check_picture(tmp_path / name)
    (tmp_path / "ours.json").write_text('{"machine": 1, "variants": {}, "more": 0}')
    (tmp_path / "list.json").write_text('["machine", "variants"]')
    files.check_json(tmp_path / "ours.json", ("machine", "variants"))
    files.check_json(tmp_path / "new.json", ("machine", "variants"))
    for name in ("notes.txt", "list.json"):
        with pytest.raises(OutputError, match="no result of this command"):
            files.check_json(tmp_path / name, ("machine",))
