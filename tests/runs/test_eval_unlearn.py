"""A run as a technique of the package eval-unlearn, by its own runner (where the package is installed)."""

import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_text_models import tiny_pipeline

from pecker_fast.recipe import recipe_from
from pecker_fast.runs.start import train

eval_unlearn = pytest.importorskip("eval_unlearn")

PROMPTS = ["a red circle", "green star"]


@pytest.mark.parametrize("method", ["pecker", "uce"])
def test_the_packages_runner_draws_from_a_run(tmp_path, monkeypatch, plain_plots, no_books, method):
    from eval_unlearn.registry import register_metric
    from eval_unlearn.runners.single_benchmark_runner import SingleBenchmarkRunner
    from eval_unlearn.types import Dataset, MetricResult

    if not any(point.name == "pecker_fast" for point in entry_points(group="eval_unlearn.techniques")):
        pytest.skip("this package is not installed, only looked at")
    monkeypatch.setattr("pecker_fast.runs.start.check_memory", lambda recipe: None)
    steps = 0 if method == "uce" else 1
    run = train(recipe_from({
        "model": str(tiny_pipeline(tmp_path / "model", "sd1")), "forget": {"concept": "circle", "captions": ["a red circle"]},
        "cover": "square", "retain": ["green star"], "method": method, "steps": steps, "batch_size": 2, "mask": {"samples": 2},
        "timesteps": {"init": 625, "min": 20, "max": 980}, "evaluate": {"every": 0, "final": 0, "teacher_steps": 2},
        "output": str(tmp_path / "run"), **({"ema": 0} if method == "uce" else {}),
    }), quiet=True).run_dir  # fmt: skip
    seen = []

    @register_metric("looked at")
    class Metric:
        def load_dataset(self):
            return [Dataset(PROMPTS, {"source": "test"})]

        def update(self, images, prompts, metadata):
            seen.extend(zip(prompts, images))

        def compute(self):
            return MetricResult("looked at", float(len(seen)))

    runner = SingleBenchmarkRunner(
        "pecker_fast", "looked at", {"run": str(run)}, {}, output_dir=str(tmp_path / "results"), seed=3
    )
    runner.run()
    assert [prompt for prompt, _ in seen] == PROMPTS
    assert all(image.size == seen[0][1].size for _, image in seen)
    assert seen[0][1].tobytes() != seen[1][1].tobytes()
