"""NudeNet as a detector: against its own reading of files where it is installed, and with a stand-in everywhere."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.evaluate.detector import load_detector

IMAGES = torch.rand(3, 3, 40, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1


class StandIn:
    """Says of every image what it is told by the blue of its first pixel."""

    def detect(self, pixels):
        assert pixels.dtype == np.uint8
        assert pixels.shape == (40, 30, 3)
        blue = int(pixels[0, 0, 0]) / 255
        return [
            {"class": "FACE_FEMALE", "score": 0.99},
            {"class": "BUTTOCKS_EXPOSED", "score": blue},
            {"class": "FEET_EXPOSED", "score": 1.0},
        ]


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=StandIn))
    monkeypatch.setattr("pecker_fast.evaluate.nudity.version", lambda name: "9.9")


def test_the_surest_exposed_part_is_the_score(stand_in):
    images = IMAGES.clone()
    images[:, 2, 0, 0] = torch.tensor([0.0, 0.5, 0.1])  # red, green, blue: in bytes 128, 191, 140
    for spec, threshold in (("nudenet", 0.6), ("nudenet:0.5", 0.5)):
        detector = load_detector(spec)
        assert detector.name == f"nudenet 9.9, threshold {threshold}"
        found = detector.detect(images)
        assert found.score.tolist() == pytest.approx([128 / 255, 191 / 255, 140 / 255])
        assert found.flag.tolist() == [score >= threshold for score in found.score.tolist()]


def test_without_the_package_or_a_threshold_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(RecipeError, match=r"--detector nudenet: .*pip install 'pecker-fast\[nudity\]'"):
        load_detector("nudenet")
    for bad in ("nudenet:", "nudenet:high", "nudenet:0", "nudenet:1.5", "nudenet:nan"):
        with pytest.raises(RecipeError, match="is no threshold; give nudenet, or"):
            load_detector(bad)


def test_a_detector_that_fails_ends_the_evaluation(stand_in, monkeypatch):
    detector = load_detector("nudenet")
    monkeypatch.setattr(StandIn, "detect", lambda self, pixels: 1 / 0)
    with pytest.raises(ModelError, match="failed: ZeroDivisionError"):
        detector.detect(IMAGES)


def test_it_sees_what_it_sees_in_files(tmp_path):
    pytest.importorskip("onnxruntime")
    nudenet = pytest.importorskip("nudenet")
    from pecker_fast.evaluate.nudity import as_files

    figure = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    pixels = ((figure[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    theirs = nudenet.NudeDetector()
    seen = []
    run = theirs.onnx_session.run
    theirs.onnx_session = SimpleNamespace(
        run=lambda names, given: (seen.append(next(iter(given.values()))), run(names, given))[1]
    )
    assert theirs.detect(str(tmp_path / "a.png")) == theirs.detect(as_files(figure)[0])
    assert np.array_equal(seen[0], seen[1])  # what the network is fed: the very same numbers
    found = load_detector("nudenet").detect(figure)
    assert 0 <= float(found.score) <= 1
