"""The report: whole runs, runs with parts missing or damaged, and the tables and plots behind it."""

import io
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from pecker_kernels import SaliencyMask
from PIL import Image
from rich.console import Console

from pecker_fast.errors import DataError
from pecker_fast.records.events import Tracker
from pecker_fast.report import mask_table, metrics_table, plot_mask, write_report
from pecker_fast.report.figures import mask_blocks, mask_layers
from pecker_fast.report.mask import MaskRow, by_block
from pecker_fast.report.read import read_run, timeline
from pecker_fast.report.text import count, figure, scaled, seconds

METRICS = {
    "before": {"ua": 0.02, "cover_rate": 0.001, "retain_accuracy": 0.964, "fid": 31.2, "inception_score": 8.3,
               "precision": 0.81, "recall": 0.63, "samples": 2000, "per_class": {"0": 0.98, "1": 0.97}},
    "after": {"ua": 0.998, "cover_rate": 0.971, "retain_accuracy": 0.983, "fid": 19.4, "inception_score": 8.42,
              "precision": 0.84, "recall": 0.71, "samples": 2000, "per_class": {"0": 0.002, "1": 0.99}},
    "teacher": {"ua": 0.008, "cover_rate": 0.0, "retain_accuracy": 0.991, "fid": 16.0, "inception_score": 8.5,
                "precision": 0.86, "recall": 0.78, "samples": 2000, "per_class": {"0": 0.992, "1": 0.991}},
    "cost": {"training_s": 112.3, "total_s": 141.9, "images": 70400, "flops": 4.3e13, "peak_memory_bytes": 956301312},
    "judge": {"held_out_accuracy": 0.997, "teacher_accuracy": 0.991, "fid_floor": 3.14, "reference_samples": 1619},
}  # fmt: skip
SHAPES = {
    "conv_in.weight": (4, 1, 3, 3),
    "conv_in.bias": (4,),
    "down_blocks.0.resnets.0.conv1.weight": (8, 4, 3, 3),
    "down_blocks.1.resnets.0.conv1.weight": (8, 8, 3, 3),
    "mid_block.attentions.0.to_q.weight": (8, 8),
}


def make_mask():
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    return SaliencyMask.from_scores(scores, density=0.25)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    (folder / "samples").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        "model: digits\nmethod: pecker\nforget: 0\ncover: 1\nseed: 5\nupdate_rule: differentiated\n"
    )
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    for i, name in enumerate(("before", "after", "teacher", "step-000010")):
        Image.new("L", (8, 8), 60 * i).save(folder / "samples" / f"{name}.png")
    make_mask().save(folder / "mask.safetensors")
    with Tracker(folder, console="none") as tracker:
        tracker.event("start", 0, versions={"torch": "2.13"}, device="a <processor>", threads=2, recipe_sha256="ab12")
        for step in range(1, 31):
            stage = "distill" if step <= 10 else "forget"
            tracker.event("step", step, stage=stage, score_loss=9.0 / step, retain_loss=2.0, forget_loss=3.0 / step)
            if step % 10 == 0:
                tracker.event("evaluate", step, ua=step / 30, cover_rate=0.9, retain_accuracy=0.95, fid=60 / step)
        tracker.event("end", 30, training_s=112.3, images=70400)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "digits")


@pytest.fixture
def bare(run):
    """A run without anything to plot."""
    (run / "mask.safetensors").unlink()
    (run / "run.jsonl").unlink()
    return run


class Page(HTMLParser):
    """Checks that tags pair, ids are unique and nothing is fetched; collects the text."""

    VOID = frozenset({"meta", "img", "br", "link", "path", "use", "rect"})

    def __init__(self, text):
        super().__init__()
        self.stack, self.ids, self.text, self.tags = [], [], "", []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_startendtag(self, tag, attributes):
        self.note(tag, dict(attributes))

    def handle_starttag(self, tag, attributes):
        self.note(tag, dict(attributes))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack[-1:] != ["style"]:
            self.text += data + "\n"

    def note(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        assert tag not in ("script", "link", "iframe", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))


def page(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    assert "@import" not in text
    assert not re.search(r"url\((?!['\"]?#)", text)
    parsed = Page(text)
    assert len(parsed.ids) == len(set(parsed.ids))
    return parsed


def test_whole_run(run):
    seen = page(run)
    shown = (
        "digits: forget 0, cover 1|method pecker|finished|seed: 5|2.13|a <processor>|ab12|99.8 %|97.1 %|98.3 %|19.40"
    )
    shown += "|1.21 ×|31.20|16.00|8.42|84.0 %|71.0 %|3.14|99.7 %|1 min 52 s|2 min 22 s|70,400|43 TFLOP|912 MiB"
    shown += "|conv_in.weight|4×1×3×3"
    for text in shown.split("|"):
        assert text in seen.text, text
    assert seen.tags.count("svg") == 5
    assert seen.tags.count("img") == 4
    assert seen.tags.count("details") == 3
    assert "Could not be read" not in seen.text


def test_report_is_the_same_every_time(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


PARTS = ["recipe.yaml", "run.jsonl", "metrics.json", "mask.safetensors", "samples"]


@pytest.mark.parametrize("missing", [[part] for part in PARTS] + [PARTS[1:], PARTS[:2] + PARTS[3:], PARTS[3:]])
def test_missing_parts_are_left_out(run, missing):
    for name in missing:
        shutil.rmtree(run / name) if name == "samples" else (run / name).unlink()
    seen = page(run)
    assert "Could not be read" not in seen.text
    assert ("svg" in seen.tags) == ("mask.safetensors" not in missing or "run.jsonl" not in missing)
    assert ("img" in seen.tags) == ("samples" not in missing)
    assert ("99.8 %" in seen.text) == ("metrics.json" not in missing)
    assert ("Nothing was evaluated" in seen.text) == ("metrics.json" in missing)


@pytest.mark.parametrize(
    "metrics",
    [{}, {"before": METRICS["before"]}, {"before": None, "after": None, "teacher": None, "judge": None, "cost": None},
     {"after": dict.fromkeys(METRICS["after"])}, {"after": METRICS["after"] | {"fid": None, "recall": None}},
     {"after": "good", "cost": [1], "judge": 3}, {"after": {"ua": "high", "fid": True, "per_class": [1]}},
     {"after": {"ua": float("nan"), "fid": float("inf")}, "teacher": {"fid": 0.0}}],
)  # fmt: skip
def test_partial_metrics(bare, metrics):
    (bare / "metrics.json").write_text(json.dumps(metrics))
    page(bare)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("metrics.json", b'{"after": '),
        ("metrics.json", b"[]"),
        ("run.jsonl", b"nonsense\n{}\n"),
        ("recipe.yaml", b"a: [b"),
        ("recipe.yaml", b"\xff\xfe\x00"),
        ("mask.safetensors", b"12"),
        ("samples/before.png", b"<svg onload=alert(1)>"),
    ],
)
def test_damaged_parts_are_named(bare, name, data):
    run = bare
    (run / name).write_bytes(data)
    seen = page(run)
    assert "Could not be read" in seen.text
    assert name in seen.text


def test_stopped_and_killed_runs_say_so(run):
    (run / "mask.safetensors").unlink()
    lines = (run / "run.jsonl").read_text().splitlines()[:-1]
    (run / "run.jsonl").write_text("\n".join(lines) + '\n{"event": "st')
    assert "not finished, last seen at step 30" in page(run).text
    with Tracker(run, console="none") as tracker:
        tracker.event("stop", 30, reason="SIGINT")
    assert "stopped at step 30: SIGINT" in page(run).text


def test_everything_is_escaped(run):
    evil = "<script>alert(1)</script>'\"&"
    (run / "recipe.yaml").write_text(
        f"model: {json.dumps(evil)}\nmethod: {json.dumps(evil)}\nforget: {json.dumps(evil)}\n"
    )
    metrics = METRICS | {"after": METRICS["after"] | {"per_class": {evil: 0.5}}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "samples" / "<img src=x onerror=alert(1)>.png").write_bytes((run / "samples" / "after.png").read_bytes())
    with Tracker(run, console="none") as tracker:
        tracker.event("start", 30, versions={evil: evil}, device=evil, recipe_sha256=evil)
        tracker.event("stop", 30, reason=evil)
    seen = page(run)  # its parser refuses scripts, handlers and foreign addresses
    assert evil in seen.text


def test_a_recipe_is_read_by_the_strict_loader(bare):
    """Aliases that multiply, tags and endless nesting are a note on the page, in no time and no memory."""
    layers = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
    for text in (f"a0: &a0 [{'x,' * 9}]\n{layers}\nforget: *a11\n", "forget: !!python/object:x.y {}\n", "[" * 100_000):
        (bare / "recipe.yaml").write_text(text)
        seen = page(bare)
        assert "Could not be read" in seen.text
        assert len(seen.text) < 20_000
    (bare / "recipe.yaml").write_bytes(b"# " + b"x" * (1 << 20))
    assert "too long for a text file" in page(bare).text


NAMES = ["$", "$\\frac$", "$\\frac", "${", "a$b$c^_", "\\alpha_{", "<b>&amp;", "\ud800", "\x00\x1b[2J", "\n\n", "", ".",
         "中文😀", "x" * 5000, "a.0.b", "%s{0}", "_hidden", "\u202eevil"]  # fmt: skip


def test_tensors_of_any_name_are_shown(bare):
    """Names that matplotlib would take for mathematics, or that no page can hold, and more blocks than fit on it."""
    names = [*NAMES, *(f"block{i}.{i}.weight" for i in range(200))]
    rows = [MaskRow(name, (2,), 2, 1, 0.5) for name in names]
    assert len(by_block(rows)) == 61
    assert sum(row.weights for row in by_block(rows)) == 2 * len(names)
    for svg in (mask_blocks(by_block(rows), 0.5), mask_layers(rows, 0.5)):
        assert svg.startswith("<svg")
        Page(svg)
    scores = {name: torch.rand(4) for name in names if name.isprintable() and name not in ("", ".")}
    SaliencyMask.from_scores(scores, density=0.5).save(bare / "mask.safetensors")
    assert "$\\frac" in page(bare).text
    plot_mask(SaliencyMask.load(bare / "mask.safetensors"), bare / "mask.png")


def test_prompts_and_lists_as_conditions(bare):
    run = bare
    (run / "recipe.yaml").write_text("model: sd\nforget: {concept: a person, prompts: [x, y]}\ncover: someone\n")
    assert "sd: forget a person, cover someone" in page(run).text
    (run / "recipe.yaml").write_text("model: digits\nforget: [0, 1, 2, 3, 4, 5, 6, 7]\ncover: 9\n")
    assert "forget 0, 1, 2, 3, 4, 5 and 2 more, cover 9" in page(run).text


def test_no_run_folder(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DataError, match="not a run folder"):
            write_report(folder)


def event(name, step, **values):
    return {"event": name, "step": step, **values}


def test_timeline_keeps_the_later_record_of_a_step_done_twice():
    events = [event("step", s, stage="forget", score_loss=1.0) for s in (1, 2, 3, 4)]
    events += [event("start", 2, resumed_from=2)]
    events += [event("step", s, stage="forget", score_loss=2.0) for s in (3, 4, 5)]
    distill_end, steps, _ = timeline(events)
    assert distill_end == 0
    assert [(x, values["score_loss"]) for x, values in steps] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


@pytest.mark.parametrize("first", [1, 5])  # the second stage counts anew, or on
def test_timeline_puts_the_stages_one_behind_the_other(first):
    events = [event("step", s, stage="distill") for s in (1, 2, 3, 4)] + [event("evaluate", 4, ua=0.0)]
    events += [event("step", first + i, stage="forget") for i in range(3)] + [event("evaluate", first + 2, ua=1.0)]
    distill_end, steps, evaluations = timeline(events)
    assert distill_end == 4
    assert [x for x, _ in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [(x, values["ua"]) for x, values in evaluations] == [(4, 0.0), (7, 1.0)]


def test_timeline_of_nothing():
    assert timeline([]) == (0, [], [])
    assert timeline([{"event": "step"}, event("step", None), event("other", 1)]) == (0, [], [])


def test_mask_table_counts_what_the_mask_keeps():
    mask = make_mask()
    rows = mask_table(mask)
    assert [row.name for row in rows] == list(SHAPES)
    assert [row.shape for row in rows] == list(SHAPES.values())
    assert sum(row.kept for row in rows) == mask.count
    assert sum(row.weights for row in rows) == mask.total
    for row in rows:
        assert row.kept == int(mask.bool(row.name).sum())
        assert row.density == row.kept / row.weights
    blocks = by_block(rows)
    assert [block.name for block in blocks] == ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block"]
    assert sum(block.kept for block in blocks) == mask.count


def test_plot_mask(tmp_path):
    path = plot_mask(make_mask(), tmp_path / "plots" / "mask.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 960
        assert len(set(image.convert("L").getdata())) > 10


def test_plot_of_a_mask_with_one_tensor_and_with_nothing_kept(tmp_path):
    one = SimpleNamespace(
        names=["w"], shapes={"w": (3,)}, density=0.0, count=0, total=3, structure="element", density_of=lambda name: 0.0
    )
    assert plot_mask(one, tmp_path / "one.png").stat().st_size > 1000


def printed(metrics):
    console = Console(file=io.StringIO(), width=110)
    console.print(metrics_table(metrics))
    return console.file.getvalue()


def test_metrics_table():
    lines = {line[2:20].strip(): line for line in printed(METRICS).splitlines()}
    assert re.findall(r"[\d.]+", lines["Unlearning accurac"[:18]]) == ["2.0", "99.8", "0.8"]
    assert re.findall(r"[\d.]+", lines["FID ↓"]) == ["31.20", "19.40", "16.00"]
    assert re.findall(r"[\d.]+", lines["FID / teacher's ↓"]) == ["1.95", "1.21", "1.00"]
    for text in ("99.7 % right on held-out", "99.1 % as conditioned", "3.14", "1,619 reference"):
        assert text in " ".join(printed(METRICS).split())


def test_metrics_table_of_nothing():
    assert "–" in printed({})
    assert "teacher's" not in printed({"after": {"fid": 3.0}, "judge": None})


def test_numbers_as_text():
    assert [seconds(x) for x in (None, 0.25, 59.0)] == ["–", "0.2 s", "59.0 s"]
    assert [seconds(x) for x in (61, 3600, 7325)] == ["1 min 1 s", "1 h 0 min", "2 h 2 min"]
    assert scaled(2.5e12, "FLOP") == "2.5 TFLOP"
    assert [figure(x, True) for x in (0.9994, 0.9995, 1 - 1e-9, 1.0)] == ["99.9 %", "> 99.9 %", "> 99.9 %", "100.0 %"]
    assert scaled(512, "B", 1024) == "512 B"
    assert scaled(3 * 2**30, "B", 1024) == "3 GiB"
    assert (figure(0.98765, True), figure(12.345, False), figure(float("nan"), True)) == ("98.8 %", "12.35", "–")
    assert (figure(12345.6, False), count(64000), count("many"), figure(True, True)) == ("12,346", "64,000", "–", "–")


def test_read_run_changes_nothing(run):
    before = sorted(path.name for path in run.rglob("*"))
    read_run(run)
    assert sorted(path.name for path in run.rglob("*")) == before


def test_the_table_of_a_thousand_classes_is_short(run):
    """Forgotten classes stay, then those that changed most."""
    metrics = json.loads((run / "metrics.json").read_text())
    for column, accuracy in (("before", 0.9), ("after", 0.8)):
        metrics[column]["per_class"] = {str(c): accuracy for c in range(1000)}
    metrics["after"]["per_class"]["777"] = 0.1
    (run / "metrics.json").write_text(json.dumps(metrics))
    text = write_report(run).read_text()
    rows = re.findall(r"<th scope='row'>(\d+)</th>", text)
    assert len(rows) == 40
    assert {"0", "777"} <= set(rows)
    assert "960 more are in metrics.json" in text
