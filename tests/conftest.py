"""Shared fixtures: a tiny class-conditional model folder with a judge, random weights, that trains in milliseconds."""

import os
import signal
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".cache"
# Before torch is imported, and for every process a test starts. Workers share the cores: threads of one that wait for each other
# spin while another's work waits. What libraries keep stays inside the checkout, whatever the home folder is.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "XDG_CACHE_HOME": str(CACHE),
    "HF_HOME": str(CACHE / "huggingface"),
    "MPLCONFIGDIR": str(CACHE / "matplotlib"),
    "TRITON_HOME": str(CACHE),
    "TORCH_HOME": str(CACHE / "torch"),
    "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
    "HF_HUB_DISABLE_TELEMETRY": "1",  # as the command line sets it
}
os.environ.pop("TORCH_EXTENSIONS_DIR", None)
# A job in the background of a shell, or under nohup, ignores them, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

from some import by_test, spread  # noqa: E402
from tiny_models import TINY_KEYS, write_tiny_model  # noqa: E402  it imports torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`some(n)`: n of a test's cases are part of `make test`, all of `make test-all`."""
    for cases in by_test(items).values():
        marker = cases[0].get_closest_marker("some")
        if marker is not None:
            quick = [item for item in cases if item.get_closest_marker("slow") is None]
            kept = spread(quick, *marker.args)
            for item in quick:
                if item not in kept:
                    item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def same_environment():
    """A test that leaves RANK or the like behind changes what other tests find, and only at times."""
    before = dict(os.environ)
    yield
    left = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    left -= {"PYTEST_CURRENT_TEST", "LD_LIBRARY_PATH"}  # the latter by OpenCV when it is imported
    for name in left:
        os.environ.pop(name, None)
        os.environ.update({name: before[name]} if name in before else {})
    assert not left, f"left in the environment: {sorted(left)}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def plain_plots(request, monkeypatch):
    """The plots of a run's page, a third of a run this small, are left out but where a test is marked `plots`: tests/report
    has them."""
    if request.node.get_closest_marker("plots") is None:
        monkeypatch.setattr("pecker_fast.report.figures._svg", lambda figure, name, label: f"<svg id='{name}'></svg>")


@pytest.fixture
def no_books(request, monkeypatch):
    """The FLOPs of an iteration and of the saliency pass, a third of a run this small, are counted where a test is marked
    `books`."""
    if request.node.get_closest_marker("books") is None:
        from least_runs import NoBooks

        monkeypatch.setattr("pecker_fast.runs.loop.Accountant", NoBooks)
        monkeypatch.setattr("pecker_fast.forgetting.SaliencyPass.flops", lambda self: 0.0)


@pytest.fixture
def no_forecast(monkeypatch, plain_plots, no_books):
    """Runs this small need no rehearsal of their memory, no plots and no books."""
    monkeypatch.setattr("pecker_fast.runs.start.check_memory", lambda recipe: None)


@pytest.fixture(scope="session")
def sd1(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion 1 that nobody writes to."""
    from tiny_text_models import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("models") / "sd1", "sd1")


@pytest.fixture
def tiny_recipe(tiny_model, tmp_path, plain_plots, no_books):
    """make(**keys) -> a Recipe over the tiny model with a fresh output folder; sections are merged."""
    from pecker_fast.recipe import recipe_from

    def make(**keys):
        data = {**TINY_KEYS, "model": str(tiny_model), "output": str(tmp_path / "run")}
        for key, value in keys.items():
            data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
        return recipe_from(data)

    return make


@pytest.fixture
def setup(tiny_recipe):
    """make(mask density or None, device, structure, **keys) -> (recipe, engine, state, mask).

    ψ and θ are moved off φ, so that no loss is zero.
    """
    import torch
    from pecker_kernels import SaliencyMask

    from pecker_fast.engine import LocalEngine, TrainState
    from pecker_fast.engine.state import start_ema
    from pecker_fast.forgetting.methods import get_method
    from pecker_fast.forgetting.updates import adam
    from pecker_fast.loading.parts import load_parts

    def make(density=0.4, device="cpu", structure="element", **keys):
        recipe = tiny_recipe(**keys)
        parts = load_parts(recipe)
        for seed, network in ((1, parts.score), (2, parts.generator)):
            g = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for _, p in network.named_parameters():
                    p.add_(0.05 * torch.randn(p.shape, generator=g))
        teacher, score, generator = (network.to(device) for network in (parts.teacher, parts.score, parts.generator))
        named = generator.named_parameters()
        shape = {"density": density, "structure": structure, "tile": (16, 16)}
        mask = SaliencyMask.random(named, seed=3, **shape) if density else None
        state = TrainState(
            teacher, score, generator, adam(recipe, score.named_parameters(), recipe.lr.score),
            get_method(recipe.method).updates(recipe, named, mask), start_ema(generator, recipe.ema),
        )  # fmt: skip
        return recipe, LocalEngine(recipe, parts.conditions, torch.device(device)), state, mask

    return make
