"""Memory and time before a run: for this machine and for another, in one line or with a table, and what would help."""

import json
from dataclasses import replace

import pytest
from test_text_train import recipe as text_recipe
from tiny_models import write_tiny_model
from tiny_text_models import tiny_pipeline

from pecker_fast import cli
from pecker_fast.account.memory import Prediction, TooLarge, enough, size
from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.machine.devices import device_of
from pecker_fast.recipe import load_recipe, recipe_to_yaml, with_overrides
from pecker_fast.runs import forecast as forecasts
from pecker_fast.runs.planning import plan_rows
from pecker_fast.runs.start import train

GIB = 1 << 30
CARD = "cuda:80GB"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("models") / "sd1", "sd1")


@pytest.fixture
def recipe(model, tmp_path):
    return text_recipe(model, tmp_path / "run", batch_size=2)


@pytest.mark.parametrize(
    ("text", "kind", "size"),
    [
        ("cuda:80GB", "cuda", 80 * 10**9),
        ("cuda:24gib", "cuda", 24 * GIB),
        ("cpu:16GB", "cpu", 16 * 10**9),
        ("cpu:512MB", "cpu", 512 * 10**6),
    ],
)
def test_a_device_is_described(text, kind, size):
    device = device_of(text)
    assert (device.kind, device.memory_bytes, device.here) == (kind, size, kind == "cpu")


@pytest.mark.parametrize("keys", [{"attention_head_dim": 64}, {"norm_num_groups": None}], ids=str)
def test_configs_that_make_no_network_are_one_line(tmp_path, keys):
    config = write_tiny_model(tmp_path / "model") / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **keys}))
    with pytest.raises(ModelError, match="its configs make no network that can be rehearsed"):
        forecasts.forecast(load_recipe(None, [f"model={tmp_path / 'model'}"]))


@pytest.mark.parametrize(
    "text", ["", "gpu", "cuda:0", "cuda:80", "cuda:-1GB", "cpu:0GB", "cuda:80GB:1", "cuda:1e3GB", "cuda 80GB\n"]
)
def test_no_device_is_one_line(text, capsys):
    with pytest.raises(RecipeError, match="--device"):
        device_of(text)
    assert cli.main(["doctor", "digits", "--device", text]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_time_of_a_card_that_is_not_here_is_said_to_be_an_estimate():
    rate, words = device_of(CARD).sheet_rate("bf16")
    assert rate == 0.3 * 312e12
    assert "A100" in words
    assert "not measured" in words
    assert device_of("cuda:24GB").sheet_rate("fp32")[0] < rate < device_of("cuda:141GB").sheet_rate("bf16")[0]


def test_options_that_do_not_go_together(capsys):
    assert cli.main(["train", "digits", "--device", "cpu"]) == 2
    assert "add --dry-run" in capsys.readouterr().err
    assert cli.main(["doctor", "--device", "cpu"]) == 2
    assert "name one" in capsys.readouterr().err


@pytest.mark.slow
def test_a_gpus_rules_apply_whatever_is_here(recipe):
    """Unfused attention, which a CPU takes in bf16, keeps the matrix of all pairs."""
    half = with_overrides(recipe, ["precision=bf16"])
    there, here = (forecasts.forecast(half, device_of(text)) for text in (CARD, "cpu:80GB"))
    assert there.phases["generator step"] < here.phases["generator step"]
    assert there.flops["forget"] == pytest.approx(here.flops["forget"], rel=0.1)


def test_resolution_counts(recipe):
    sizes = [forecasts.configs_of(with_overrides(recipe, [f"resolution={n}"]))[0]["sample_size"] for n in (32, 64)]
    assert sizes == [8, 16]
    assert forecasts.configs_of(recipe)[0]["sample_size"] == 8


def test_a_dry_run_tells_what_it_found(recipe, capsys, tmp_path, monkeypatch):
    found = Prediction({"activations": GIB}, {"generator step": GIB}, flops={"forget": 10**12})
    monkeypatch.setattr(forecasts, "forecast", lambda recipe, device: found)
    path = tmp_path / "r.yaml"
    path.write_text(recipe_to_yaml(recipe))
    assert cli.main(["train", str(path), "--dry-run", "--device", CARD]) == 0
    printed = capsys.readouterr().out
    shown = "# model: |UNet2DConditionModel|# forget: 3 prompts|# retain: 4 captions|# judge: none|# output: "
    shown += "|# device: GPU of 80 GB, 74.51 GiB"
    shown += "|# an iteration of forgetting: |not measured|# memory (predicted): 1.00 GiB: activations"
    for text in shown.split("|"):
        assert text in printed, text
    again = tmp_path / "printed.yaml"
    again.write_text(printed)
    assert load_recipe(again) == recipe
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_classes_tells_alike(tiny_recipe):
    found = dict(train(tiny_recipe(), dry_run=True).found)
    assert found["forget"] == "classes 0 (draw 1)"
    assert found["null class"] == "3"
    assert "measured here" in found["an iteration of forgetting"]
    assert "MiB: teacher" in found["memory (predicted)"]


@pytest.mark.slow
def test_remedies_of_a_refusal_were_tried(recipe):
    device = device_of("cuda:1GB")
    most = forecasts.forecast(recipe, device).peak_bytes
    with pytest.raises(TooLarge, match="tried: ") as refused:
        forecasts.check_memory(recipe, device_of(f"cuda:{0.9 * most / 1e6:.3f}MB"))
    said = str(refused.value).partition("tried: ")[2].partition("; ")[0].split(", ")
    named = [one.partition(" takes ")[0] for one in said]
    assert len(named) > 2
    peaks = [forecasts.forecast(with_overrides(recipe, [key]), device).peak_bytes for key in named]
    assert [one.partition(" takes ")[2] for one in said] == [size(peak) for peak in peaks]
    assert all(peak < most for peak in peaks)  # each helps
    assert peaks == sorted(peaks)  # the greatest gain first


def test_a_refusal_prints_its_table_and_one_line(recipe, tmp_path, capsys, monkeypatch):
    found = Prediction(
        {"generator": 3 * GIB, "activations": 7 * GIB}, {"generator step": 10 * GIB}, (("state", "score=lora"),)
    )
    less = replace(found, phases={"generator step": GIB})
    monkeypatch.setattr(forecasts, "forecast", lambda one, device: less if one.score == "lora" else found)
    path = tmp_path / "r.yaml"
    path.write_text(recipe_to_yaml(recipe))
    for arguments in (["train", str(path), "--dry-run"], ["doctor", str(path)]):
        assert cli.main([*arguments, "--device", "cuda:2GB"]) == 2
        printed = capsys.readouterr()
        assert printed.err == (
            "error: memory: this recipe needs about 10.00 GiB (activations 7.00 GiB, generator 3.00 GiB), 1.86 GiB are available; "
            "tried: score=lora takes 1.00 GiB\n"
        )
        table = printed.out.partition("memory (predicted)\tbytes\n")[2]
        assert (
            table
            == "generator\t3.00 GiB\nactivations\t7.00 GiB\npeak of the generator step\t10.00 GiB\npeak\t10.00 GiB\n"
        )


KEYS = ("engine.checkpointing=true", "engine.micro_batch=1", "score=lora", "ema=0", "batch_size below 8")


def refusal(peaks, available):
    """What is said where keys lead to these peaks (None: they do not go together), and all that was tried."""
    tried = []

    def again(keys):
        tried.append(keys)
        peak = peaks(keys)
        return None if peak is None else Prediction({"activations": 0}, {"x": peak * GIB})

    kinds = tuple(("state" if key in ("score=lora", "ema=0") else "activations", key) for key in KEYS)
    with pytest.raises(TooLarge) as refused:
        enough(Prediction({"teacher": 1, "activations": 90 * GIB}, {"x": 100 * GIB}, kinds), available * GIB, again)
    return str(refused.value).partition("; ")[2], tried


def test_only_what_helps_is_named_the_greatest_gain_first():
    peaks = {
        "engine.checkpointing=true": 60,
        "engine.micro_batch=1": 40,
        "score=lora": None,
        "ema=0": 100,
        "batch_size=4": 70,
    }
    said, tried = refusal(lambda keys: peaks[keys[0]], 50)
    assert said == (
        "tried: engine.micro_batch=1 takes 40.00 GiB, engine.checkpointing=true takes 60.00 GiB, batch_size=4 takes 70.00 GiB"
    )
    assert tried == [[key] for key in peaks]


def test_keys_together_where_none_is_enough_alone():
    said, _ = refusal(lambda keys: 100 - 10 * len(keys) - (keys == ["score=lora"]), 75)
    assert said.endswith("; together score=lora engine.checkpointing=true engine.micro_batch=1 take 70.00 GiB")
    said, _ = refusal(lambda keys: 100 - 10 * len(keys), 30)
    assert said.endswith("; that is not enough, nor is all of it together")
    assert refusal(lambda keys: None, 30)[0] == "it needs a larger device, or a smaller model"
    assert refusal(lambda keys: None, 5)[1] == [["score=lora"], ["ema=0"]]  # no smaller batch would do


def test_a_class_run_is_looked_at_where_it_is_not_small(tiny_recipe, monkeypatch):
    recipe = tiny_recipe()
    assert forecasts.surely_fits(recipe)
    monkeypatch.setattr("pecker_fast.machine.hardware.memory_bytes", lambda: 1 << 20)
    assert not forecasts.surely_fits(recipe)
    monkeypatch.setattr(forecasts, "forecast", lambda recipe, device: Prediction({"activations": GIB}, {"x": GIB}))
    with pytest.raises(TooLarge, match="this recipe needs about"):
        train(recipe, quiet=True)


def test_flops_of_the_rehearsal_are_those_that_are_counted(setup):
    from pecker_fast.account import counted
    from pecker_fast.account.memory import predict
    from pecker_fast.runs.loop import iteration

    recipe, engine, state, _ = setup(batch_size=8)
    iteration(engine, state)
    found = counted(engine, state)["counted_flops"]
    assert predict(recipe, dict(state.generator.config)).flops["forget"] == pytest.approx(found, rel=0.05)


@pytest.mark.slow
def test_pieces_of_a_batch_after_the_second_are_as_the_second(recipe):
    """What stands for all of them: memory of the whole within the inputs' few bytes, FLOPs of all."""
    five, whole = (
        with_overrides(recipe, ["batch_size=5", "engine.micro_batch=1"]),
        with_overrides(recipe, ["batch_size=2", "engine.micro_batch=1"]),
    )
    p, q = forecasts.forecast(five), forecasts.forecast(whole)
    assert p.phases["generator step"] == q.phases["generator step"]
    assert p.flops["forget"] == round(q.flops["forget"] * 5 / 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15_celebrity", "sd15_nudity", "sd21_celebrity", "sdxl_celebrity"])
def test_shipped_recipes_fit_one_card_of_80_gb(name):
    rows, memory = plan_rows(load_recipe(name), CARD)  # raises where it does not
    assert memory[-1][0] == "peak"
    assert any("not measured" in value for _, value in rows)
