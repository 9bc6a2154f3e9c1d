"""Pretraining: a few steps give a whole model folder, twice the same; an interrupted one ends where a whole does."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from pecker_fast import draws, files
from pecker_fast.account.memory import TooLarge, size
from pecker_fast.data import datasets as data_sets
from pecker_fast.data.datasets import Dataset
from pecker_fast.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    NonFiniteError,
    OutputError,
    PeckerError,
    RecipeError,
)
from pecker_fast.evaluate.judge import load_judge
from pecker_fast.networks.denoiser import Denoiser, load_denoiser
from pecker_fast.networks.schedule import Schedule, load_schedule
from pecker_fast.pretrain import SETTINGS, Settings, memory, pretrain, unet_config
from pecker_fast.pretrain import output as folders
from pecker_fast.pretrain.fit import fit, resumable
from pecker_fast.pretrain.judge import augment
from pecker_fast.pretrain.settings import fitted, lr_at, settings_for
from pecker_fast.pretrain.teacher import noise_prediction_loss
from pecker_fast.runs.start import _class_names

SHORT = replace(
    SETTINGS["digits"], steps=4, batch_size=8, judge_steps=4, samples=20, sampler_steps=2, checkpoint_every=2
)


def run(folder: Path, settings: Settings = SHORT, seed: int = 0) -> Path:
    return pretrain("digits", output=folder, settings=settings, seed=seed, distill_steps=0)


def weights(folder: Path) -> str:
    paths = sorted(folder.rglob("*.safetensors"))
    assert len(paths) == 4
    return " ".join(f"{file.relative_to(folder)} {files.sha256_file(file)}" for file in paths)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("pretrain") / "digits")


def test_folder_loads_in_stock_diffusers(model: Path) -> None:
    unet = UNet2DModel.from_pretrained(model / "unet")
    assert unet.config.num_class_embeds == 11
    assert DDPMScheduler.from_pretrained(model / "scheduler").config.num_train_timesteps == 1000
    pipeline = DDPMPipeline.from_pretrained(model)
    stored = files.read_weights(model / "unet")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(value.float(), stored[name].float())


def test_folder_loads_in_the_engine(model: Path) -> None:
    files.check_model_folder(model)
    denoiser = load_denoiser(model)
    assert denoiser.null_class == 10
    assert denoiser.classes == list(range(10))
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    truth = torch.cumprod(1 - betas, 0).sqrt().float()
    assert torch.allclose(denoiser.schedule.a, truth, atol=1e-5)
    judge, reference = load_judge(model / "judge")
    assert reference is not None
    assert len(reference) == 1797
    digits = data_sets.digits()  # the reference is what the stored judge sees, but for the rounding on disk
    features, _ = judge.judge(digits.images)
    assert (reference.features - features).abs().max() <= features.abs().max() * 2**-11
    assert torch.equal(reference.labels, digits.labels)


def test_card_says_how_it_was_made_and_how_good_it_is(model: Path) -> None:
    card = files.read_json(model / "model.json")
    assert card["command"] == "pecker-fast pretrain digits --steps 4 --seed 0 --distill-steps 0"
    assert (card["null_class"], card["num_classes"], card["seed"], card["resumed_from"]) == (10, 10, 0, None)
    assert card["settings"]["steps"] == 4
    assert card["data"] == {"images": 1797, "split": "all", "sha256": data_sets.digits().sha256()}
    assert {"torch", "diffusers"} <= set(card["versions"])
    figures = card["figures"]
    assert 0 <= figures["teacher_accuracy"] <= 1
    assert figures["teacher_fid"] > figures["fid_floor"] > 0
    assert figures["reference_samples"] == 1797
    assert figures["judge"]["held_out_images"] == 359
    assert not list(model.glob("partial*"))


def test_same_seed_same_model_other_seed_another(model: Path, tmp_path: Path) -> None:
    assert weights(run(tmp_path / "again")) == weights(model)
    assert weights(run(tmp_path / "other", seed=1)) != weights(model)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_interrupted_run_ends_where_a_whole_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    settings = replace(SHORT, dropout=dropout, checkpoint_every=100)
    whole = run(tmp_path / "whole", settings)
    monkeypatch.setattr("pecker_fast.pretrain.fit.lr_at", _then_signal(at_step=1))
    with pytest.raises(Interrupted, match="continues after step 2 of 4") as stopped:
        run(tmp_path / "cut", settings)
    assert stopped.value.exit_code == 128 + signal.SIGINT
    monkeypatch.undo()
    cut = tmp_path / "cut"
    with pytest.raises(OutputError, match="unfinished run with other seed"):
        run(cut, settings, seed=1)
    assert not (cut / "unet").exists()
    run(cut, settings)
    assert files.read_json(cut / "model.json")["resumed_from"] == 2
    assert weights(cut) == weights(whole)
    assert not list(cut.glob("partial*"))


def _then_signal(at_step: int, rate: float = SHORT.lr) -> Callable[[Settings, int], float]:
    """The signal comes in the training of the network with this learning rate."""

    def lr(settings: Settings, step: int) -> float:
        if step == at_step and settings.lr == rate:
            signal.raise_signal(signal.SIGINT)
        return lr_at(settings, step)

    return lr


def test_interrupted_judge_training_resumes_after_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pecker_fast.pretrain.fit.lr_at", _then_signal(at_step=1, rate=SHORT.judge_lr))
    with pytest.raises(Interrupted, match="judge"):
        run(tmp_path / "cut")
    monkeypatch.undo()
    run(tmp_path / "cut")
    assert files.read_json(tmp_path / "cut" / "model.json")["resumed_from"] == 4


def test_damaged_partial_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pecker_fast.pretrain.fit.lr_at", _then_signal(at_step=1))
    with pytest.raises(Interrupted):
        run(tmp_path)
    monkeypatch.undo()
    path = tmp_path / folders.PARTIAL_TENSORS
    files.write_tensors(path, files.read_tensors(path)[0])
    with pytest.raises(CheckpointError, match="step is missing"):
        run(tmp_path)
    folders.save_partial(tmp_path, {"unet/conv_in.weight": torch.zeros(1)}, 2)
    with pytest.raises(CheckpointError, match="does not fit"):
        run(tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"partial\.safetensors"):
        run(tmp_path)


def test_saved_state_stands_under_a_hash(tmp_path: Path) -> None:
    """Every tensor, every name, and the step that it is of."""
    tensors = {"unet/a": torch.arange(6.0).view(2, 3), "step/a": torch.tensor(7.0)}
    folders.save_partial(tmp_path, tensors, 7)
    path = tmp_path / folders.PARTIAL_TENSORS
    assert folders.load_partial(tmp_path) is not None
    whole, metadata = path.read_bytes(), files.read_tensors(path)[1]
    for bit in range(0, 8 * len(whole), 5):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"partial\.safetensors: "):
            folders.load_partial(tmp_path)
    files.write_tensors(path, tensors, {**metadata, "step": "9"})
    with pytest.raises(CheckpointError, match=r"damaged \(its sha256.*delete the file to start over"):
        folders.load_partial(tmp_path)
    files.write_tensors(path, tensors, {"step": "7"})  # as earlier versions wrote it
    assert folders.load_partial(tmp_path) is not None


def test_numbers_that_are_none_are_not_saved(tmp_path: Path) -> None:
    """The state that was saved before stays; the message names step and tensor."""
    network = torch.nn.Linear(3, 2)
    settings = replace(SHORT, steps=6, checkpoint_every=2, ema=0.5)
    state, save, _ = resumable(tmp_path, folders.TEACHER, network, settings)

    def loss_at(step: int) -> torch.Tensor:
        return network(torch.ones(4, 3)).square().mean() * (float("nan") if step == 3 else 1.0)

    with pytest.raises(NonFiniteError, match=r"teacher step 4: tensor unet/weight holds NaN"):
        fit("teacher", state, loss_at, settings, save)
    saved = folders.load_partial(tmp_path)
    assert saved is not None
    assert saved[1] == 2
    assert all(bool(torch.isfinite(value).all()) for value in saved[0].values())


def test_foreign_folders_are_left_alone(model: Path, tmp_path: Path) -> None:
    before = weights(model)
    with pytest.raises(OutputError, match="already holds a model"):
        run(model)
    assert weights(model) == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty and not of this command"):
        run(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        run(tmp_path / "thesis.txt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_bad_arguments(tmp_path: Path) -> None:
    cases: list[tuple[type[PeckerError], str, Callable[[], Path]]] = [
        (DataError, "unknown pretraining name 'mnist'", lambda: pretrain("mnist", output=tmp_path / "o")),
        (RecipeError, "steps: 0", lambda: pretrain("digits", output=tmp_path / "o", steps=0)),
        (RecipeError, "seed: -1", lambda: pretrain("digits", output=tmp_path / "o", seed=-1)),
        (RecipeError, "too large", lambda: pretrain("digits", output=tmp_path / "o", seed=2**63)),
        (RecipeError, "distill_steps: -1", lambda: pretrain("digits", output=tmp_path / "o", distill_steps=-1)),
        (DataError, "nothing is downloaded", lambda: pretrain("cifar10", output=tmp_path / "o")),
        (DataError, "no such file", lambda: pretrain("stl10", tmp_path / "nothing", tmp_path / "o")),
    ]
    for kind, words, call in cases:
        with pytest.raises(kind, match=words):
            call()


def test_distillation_is_asked_for_before_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, int]] = []

    def distill(
        folder: Path, *, into: Path, steps: int, seed: int, keys: dict[str, Any], dtype: torch.dtype, without: list[int]
    ) -> None:
        assert without == []
        assert dtype == torch.float16
        assert keys == SHORT.distill
        card = files.read_json(folder / "model.json")
        assert "figures" not in card
        files.write_json(folder / "model.json", {**card, "generator": {"t_init": 440}})
        shutil.copytree(folder / "unet", into / "generator")
        calls.append({"steps": steps, "seed": seed})

    monkeypatch.setattr("pecker_fast.runs.distill", distill)
    pretrain("digits", output=tmp_path / "m", settings=SHORT, seed=5, distill_steps=7)
    assert calls == [{"steps": 7, "seed": 5}]
    card = files.read_json(tmp_path / "m" / "model.json")
    assert card["generator"] == {"t_init": 440}
    assert card["figures"]["one_step_fid"] > 0
    assert 0 <= card["figures"]["one_step_accuracy"] <= 1


def test_images_take_their_size_and_their_classes_from_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for name in ("bee10", "bee2"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (10, 8), (40 * i, 0, 0)).save(tmp_path / "in" / name / f"{i}.png")
    settings = replace(SHORT, steps=1, samples=4, judge_background=None, flip=True)
    folder = pretrain("images", tmp_path / "in", tmp_path / "out", settings=settings, distill_steps=0, size=8)
    assert load_denoiser(folder).sample_shape == (3, 8, 8)
    card = json.loads((folder / "model.json").read_text())
    assert "--data PATH" in card["command"]
    assert card["class_names"] == ["bee2", "bee10"]
    assert "classes: 0 = bee2, 1 = bee10\n" in capsys.readouterr().err
    assert _class_names(folder) == card["class_names"]  # by which mask.data finds a class's folder
    assert _class_names(tmp_path) is None


@pytest.mark.parametrize(("name", "size", "count"), [("cifar10", 32, 35_751_939), ("stl10", 64, 78_706_435)])
def test_official_networks(name: str, size: int, count: int) -> None:
    """UNet2DModel at SFD's settings; SFD's network projects the class in each block: 2.9 M and 4.5 M more."""
    config = unet_config(SETTINGS[name], 3, size, 10)
    with torch.device("meta"):
        unet: Any = UNet2DModel(**config)
    assert sum(p.numel() for p in unet.parameters()) == count
    attending = [kind for kind in config["down_block_types"] if kind.startswith("Attn")]
    assert attending == ["AttnDownBlock2D"]
    assert size // 2 ** config["down_block_types"].index("AttnDownBlock2D") == 16


def test_digit_network_is_small() -> None:
    with torch.device("meta"):
        unet: Any = UNet2DModel(**unet_config(SETTINGS["digits"], 1, 8, 10))
    assert 2 * sum(p.numel() for p in unet.parameters()) < 900_000


@pytest.mark.parametrize(("size", "levels"), [(4, 1), (8, 2), (28, 3), (32, 4), (64, 5), (96, 5), (128, 6), (15, 1)])
def test_levels_follow_the_image_size(size: int, levels: int) -> None:
    config = unet_config(SETTINGS["images"], 3, size, 2)
    assert len(config["block_out_channels"]) == levels


def test_indivisible_images_are_refused() -> None:
    with pytest.raises(DataError, match="cannot be halved"):
        unet_config(SETTINGS["digits"], 1, 9, 10)


def test_loss_is_the_formula(model: Path) -> None:
    """The draws are a function of (seed, step); the loss is E‖e − ε(x_t, t, c)‖², here once more in float64."""
    schedule = load_schedule(model / "scheduler")
    digits, seen = data_sets.digits(), []

    class Recorder(Denoiser):
        def __init__(self) -> None:
            self.schedule = schedule

        @property
        def device(self) -> torch.device:
            return torch.device("cpu")

        def output(self, x_t: torch.Tensor, t: torch.Tensor, c: torch.Tensor, guidance: float = 1.0) -> torch.Tensor:
            seen.append((x_t, t, c))
            return 0.3 * x_t

    settings = replace(SETTINGS["digits"], batch_size=4000)
    loss = noise_prediction_loss(Recorder(), digits, settings, 3, 17, 10)
    again = noise_prediction_loss(Recorder(), digits, settings, 3, 17, 10)
    assert loss == again
    assert loss != noise_prediction_loss(Recorder(), digits, settings, 3, 18, 10)
    x_t, t, c = seen[0]
    g = draws.generator(3, "pretrain", 17)
    x_0 = digits.images[torch.randint(1797, (4000,), generator=g)].double()
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].sqrt().view(-1, 1, 1, 1)
    b = (1 - a**2).sqrt()
    e = (x_t.double() - a * x_0) / b
    assert abs(e.std() - 1) < 0.01
    assert abs(((e - 0.3 * x_t.double()) ** 2).mean() - loss) < 1e-3
    assert 0.08 < (c == 10).float().mean() < 0.12
    assert 450 < t.float().mean() < 550
    assert t.min() < 10
    assert t.max() > 989


def test_learning_rate_ramps_and_decays() -> None:
    settings = replace(SHORT, steps=100, lr=1.0, lr_warmup=0.1, lr_decay=True)
    rates = [lr_at(settings, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert lr_at(replace(settings, lr_decay=False), 99) == 1.0


def test_augmentation_shifts_by_whole_pixels() -> None:
    images = -torch.ones(64, 1, 8, 8)
    images[:, :, 3, 4] = 1
    settings = replace(SETTINGS["digits"], judge_noise=0.0)
    moved = augment(images, settings, draws.generator(0, "test"))
    spots = moved.flatten(1).argmax(1)
    assert (moved.flatten(1).sum(1) == -62).all()
    assert (spots == 28).sum() > 25
    assert set(spots.tolist()) <= {r * 8 + c for r in (2, 3, 4) for c in (3, 4, 5)}
    assert len(set(spots.tolist())) > 6


def test_schedule_is_ddpms(tmp_path: Path) -> None:
    folders.write_scheduler(tmp_path)
    schedule: Schedule = load_schedule(tmp_path / "scheduler")
    assert schedule.prediction_type == "epsilon"
    assert schedule.num_timesteps == 1000


def test_too_few_images_for_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = Dataset(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), 2, "images", "all")
    monkeypatch.setattr(data_sets, "open_data", lambda *args, **kwargs: two)
    with pytest.raises(DataError, match="too few"):
        run(tmp_path / "out")


def image_folder(folder: Path, count: int = 12, size: int = 16) -> Path:
    from PIL import Image

    for i in range(count):
        path = folder / ("cats" if i % 2 else "dogs") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (size, size), 20 * i).save(path)
    return folder


def test_defaults_of_an_image_folder_follow_its_images() -> None:
    own = SETTINGS["images"]
    assert fitted(own, 50_000, 32) == own  # the papers' settings, at the papers' size
    large = fitted(own, 50_000, 64)
    assert (large.batch_size, large.channels, large.steps) == (32, None, own.steps)
    few = fitted(own, 200, 64)
    assert few.batch_size == 32
    assert few.channels == (64, 128, 128, 128, 256)
    assert few.steps == 1000 * 200 // 32
    assert few.judge_steps == 1500
    assert fitted(own, 10, 256).batch_size == 8
    kept = fitted(settings_for("images", 7, 64, (32, 64)), 200, 64, frozenset({"steps", "batch_size", "channels"}))
    assert (kept.steps, kept.batch_size, kept.channels) == (7, 64, (32, 64))
    for given in ({"batch_size": 0}, {"channels": ()}, {"channels": (12,)}, {"channels": (8,) * 9}):
        with pytest.raises(RecipeError, match=next(iter(given))):
            settings_for("images", **given)
    for channels in ((64,), (40, 48), (8, 16)):  # groups and heads that divide them
        unet = UNet2DModel(**unet_config(settings_for("digits", None, None, channels), 1, 8, 10))
        assert unet(torch.zeros(1, 1, 8, 8), 0, class_labels=torch.zeros(1, dtype=torch.long)).sample.shape[1] == 1


def test_predicted_memory_is_what_a_step_takes() -> None:
    from pecker_fast.account.memory import measured_peak

    config = unet_config(SETTINGS["digits"], 1, 8, 10)
    unet: Any = UNet2DModel(**config)
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    average = [p.detach().clone() for p in unet.parameters()]

    def step() -> None:
        x = torch.zeros(64, 1, 8, 8)
        t = torch.zeros(64, dtype=torch.long)
        torch.nn.functional.mse_loss(unet(x, t, class_labels=t).sample, x).backward()

    step()
    optimizer.step()
    optimizer.zero_grad()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    with measured_peak(torch.device("cpu"), [*unet.parameters(), *average, *moments]) as peak:
        step()
    prediction = memory.predict_teacher(config, 64, beside_bytes=1000)
    assert prediction.peak_bytes == pytest.approx(peak.bytes + 1000, rel=0.03)
    assert sum(prediction.parts.values()) == prediction.peak_bytes
    assert prediction.parts["images"] == 1000


def test_what_does_not_fit_is_refused_with_options_that_do() -> None:
    settings = replace(SETTINGS["digits"], batch_size=64)

    def config_of(settings: Settings) -> dict[str, Any]:
        return unet_config(settings, 1, 8, 10)

    peak = memory.predict_teacher(config_of(settings), 64).peak_bytes
    assert memory.check(config_of, settings, 0, peak).peak_bytes == peak  # type: ignore[union-attr]
    assert memory.check(config_of, settings, 0, 1 << 50) is None  # so small that it is not looked at
    with pytest.raises(TooLarge, match="in batches of 64 needs about") as refused:
        memory.check(config_of, settings, 0, int(0.8 * peak))
    assert "--batch-size 32 takes" in str(refused.value)
    assert "--channels 16,24 takes" in str(refused.value)
    assert ("peak", size(peak)) in refused.value.table
    with pytest.raises(TooLarge, match="needs a smaller --size, or a larger machine"):
        memory.check(config_of, settings, 0, 1000)


@pytest.mark.some(1)
@pytest.mark.parametrize("name", ["images", "shapes"])
def test_every_kind_refuses_before_it_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pecker_fast import cli

    monkeypatch.setattr("pecker_fast.machine.hardware.memory_bytes", lambda: 1 << 20)
    data = ["--data", str(image_folder(tmp_path / "photos"))] if name == "images" else []
    arguments = ["pretrain", name, *data, "--output", str(tmp_path / "model"), "--batch-size", "64", "--steps", "1"]
    assert cli.main([*arguments, "--channels", "64,64"]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: memory: training at")
    assert "activations" in printed.out
    assert not (tmp_path / "model" / "unet").exists()


def test_state_is_saved_by_the_clock_and_the_judge_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SHORT, checkpoint_every=100)
    saved: list[tuple[str, int]] = []
    save = folders.save_partial

    def noted(folder: Path, tensors: dict[str, torch.Tensor], step: int, part: str = "teacher") -> None:
        saved.append((part, step))
        save(folder, tensors, step, part)

    monkeypatch.setattr("pecker_fast.pretrain.fit.save_partial", noted)
    run(tmp_path / "whole", settings)
    assert saved == [("teacher", 4), ("judge", 4), ("second_judge", 4)]
    monkeypatch.setattr("pecker_fast.pretrain.fit.SAVE_S", 0.0)
    saved.clear()

    def killed(folder: Path, tensors: dict[str, torch.Tensor], step: int, part: str = "teacher") -> None:
        noted(folder, tensors, step, part)
        if (part, step) == ("judge", 3):
            raise KeyboardInterrupt

    monkeypatch.setattr("pecker_fast.pretrain.fit.save_partial", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", settings)
    assert saved == [*(("teacher", i) for i in (1, 2, 3, 4)), *(("judge", i) for i in (1, 2, 3))]
    monkeypatch.setattr("pecker_fast.pretrain.fit.save_partial", noted)
    saved.clear()
    run(tmp_path / "cut", settings)
    assert saved == [("judge", 4), *(("second_judge", i) for i in (1, 2, 3, 4))]
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob("partial*"))
