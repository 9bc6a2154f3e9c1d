"""Predicted memory against what is alive while the engine runs."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pecker_fast import files
from pecker_fast.account.memory import Prediction, alive, enough, measured_peak, predict
from pecker_fast.account.memory.prediction import Settings
from pecker_fast.account.memory.rehearsal import planned_mask
from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.recipe import load_recipe
from pecker_fast.runs.benchmark import set_up

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import full_size

DIGITS = files.read_json(files.resolve_model("digits") / "unet" / "config.json")
STEPS = ("adversary's step", "score step", "generator step", "average")
TEXT = {
    "_class_name": "UNet2DConditionModel", "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
    "block_out_channels": [16, 32], "norm_num_groups": 8, "cross_attention_dim": 24, "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
XL = TEXT | {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 24 + 16,
    "use_linear_projection": True, "transformer_layers_per_block": [1, 2],
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16,
}  # fmt: skip


def iteration_bytes(prediction: Prediction) -> int:
    return max(n for name, n in prediction.phases.items() if name in STEPS)


def measured(engine, state, iterate) -> int:
    iterate()  # from here on the optimizers have their state
    with measured_peak(engine.device, alive(state)) as peak:
        iterate()
    return peak.bytes


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "keys",
    [
        slow("batch_size=8 mask.structure=element"),
        slow("batch_size=2 mask.structure=row mask.density=0.1 update_rule=salient_only"),
        slow("batch_size=4 mask.exclude=[class_embedding.*] adversary.conditions=4"),
        slow(
            "batch_size=2 adversary.conditions=4 adversary.batch=32 adversary.steps=2 adversary.half_way=0.4 mask.density=0.1"
        ),
        "batch_size=4 mask.density=0.1 update_rule=salient_only engine.norms=fused",
        slow("batch_size=2 mask.structure=row mask.density=0.2"),
        slow("batch_size=4 mask.structure=element mask.density=0.3 update_rule=alternating"),
        slow("batch_size=4 mask.structure=tensor mask.density=0.1 update_rule=salient_only ema=0"),
        slow("batch_size=2 optimizer.betas=[0.9,0.999] precision=bf16"),
        slow("batch_size=2 student=lora mask.structure=row mask.density=0.1 update_rule=salient_only"),
        slow(
            "batch_size=2 student=lora lora.rank=4 score=lora mask.density=0.1 mask.contrast=false update_rule=salient_only"
        ),
        slow("batch_size=2 student=lora generator=digits mask.source=none"),
        slow("method=spare batch_size=4 student=lora mask.structure=element images.samples=2"),
    ],
)
def test_prediction_is_what_the_digits_take(keys):
    recipe = load_recipe("digits", [*keys.split(), "mask.samples=2"])
    setup = set_up(recipe)
    found = measured(setup.engine, setup.state, setup.iterate)
    assert iteration_bytes(predict(recipe, DIGITS)) == pytest.approx(found, rel=0.03)


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("config", "keys", "checkpointing"),
    [
        (TEXT, "method=sfd", False),
        (XL, "mask.density=0.1 update_rule=salient_only guidance.teacher=2", True),
        slow(TEXT, "mask.density=0.1 guidance.score=2 guidance.teacher=2", True),
        slow(XL, "method=sfd", False),
        slow(
            TEXT,
            "mask.density=0.1 adversary.conditions=2 adversary.tokens=3 adversary.batch=8 adversary.half_way=0.3",
            False,
        ),
    ],
)
def test_prediction_is_what_a_text_network_takes(config, keys, checkpointing):
    recipe = full_size.with_keys(load_recipe(None, ["batch_size=2", *keys.split()]), checkpointing=checkpointing)
    engine, state = full_size.set_up(config, "epsilon", recipe, torch.device("cpu"))
    found = measured(engine, state, lambda: full_size.iteration(engine, state))
    table = sum(t.nbytes for t in state.teacher.beside())
    assert iteration_bytes(predict(recipe, config, table_bytes=table)) == pytest.approx(found, rel=0.03)


@pytest.mark.slow
def test_another_size_of_unet(tiny_recipe, setup):
    recipe, engine, state, _ = setup(batch_size=8)
    from pecker_fast.runs.loop import iteration

    found = measured(engine, state, lambda: iteration(engine, state))
    config = dict(state.generator.config)
    assert iteration_bytes(predict(recipe, config)) == pytest.approx(found, rel=0.15)


def test_parts_add_up_and_are_those_of_the_weights():
    recipe = load_recipe(None, ["batch_size=2", "mask.density=0.25"])
    p = predict(recipe, TEXT, vae_config=VAE, table_bytes=1000)
    assert sum(p.parts.values()) == p.peak_bytes == max(p.phases.values())
    weights = p.parts["generator"]
    assert p.parts["teacher"] == p.parts["score network"] == p.parts["average"] == weights
    assert p.parts["text table"] == 1000
    assert p.parts["score optimizer"] == pytest.approx(weights, rel=0.01)  # β₁ = 0 keeps the second moment alone
    assert p.parts["generator optimizer"] == pytest.approx(weights * (1 + 1 / 32), rel=0.01)  # dense, and the bits
    assert p.parts["VAE"] > 0
    assert ("peak", p.table()[-1][1]) == p.table()[-1]


@pytest.mark.slow
def test_what_takes_less():
    def peak(keys="", score="full", weights="fp32", **engine):
        recipe = load_recipe(None, ["batch_size=4", "mask.source=random", "mask.density=0.1", *keys.split()])
        recipe = full_size.with_keys(recipe, score, weights)
        recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update=engine)})
        return predict(recipe.model_copy(update={"lora": SimpleNamespace(rank=2)}), TEXT, device="cuda")

    dense, small = peak(), peak("update_rule=salient_only", checkpointing=True)
    assert small.phases["score step"] < 0.9 * dense.phases["score step"]
    assert small.parts["generator optimizer"] < 0.2 * dense.parts["generator optimizer"]
    half = peak("precision=bf16", weights="bf16", micro_batch=1)
    assert half.parts["generator"] == dense.parts["generator"] / 2
    assert half.parts["generator optimizer"] == dense.parts["generator optimizer"]  # moments stay float32
    assert half.phases["score step"] < 0.6 * dense.phases["score step"]
    lora = peak(score="lora")
    assert lora.parts["score network"] == pytest.approx(lora.parts["score optimizer"], rel=0.05)
    assert 0 < lora.parts["score network"] < 0.3 * dense.parts["score network"]


def test_a_planned_mask_has_the_size_of_a_real_one():
    named = [("a", torch.nn.Parameter(torch.zeros(32, 3, 3))), ("b", torch.nn.Parameter(torch.zeros(7)))]
    named += [(f"c{i}", torch.nn.Parameter(torch.zeros(16, 8))) for i in range(20)]
    total = sum(p.numel() for _, p in named)
    for structure, error in (("element", 1), ("row", 16), ("tensor", 288)):
        network = SimpleNamespace(whole_parameters=lambda: named)
        mask = planned_mask(load_recipe(None, ["mask.density=0.3", f"mask.structure={structure}"]), network)
        assert abs(mask.count - 0.3 * total) <= error, structure
        assert all(int(mask.bool(name).sum()) == mask.count_of(name) for name, _ in named)


@pytest.mark.slow
def test_enough_names_the_figures_and_what_is_not_done_yet():
    recipe = load_recipe(None, ["batch_size=4", "update_rule=salient_only", "precision=bf16"])
    p = predict(recipe, TEXT)
    enough(p, p.peak_bytes)
    with pytest.raises(RecipeError, match=r"needs about .* MiB \(.*are available; try ") as error:
        enough(p, p.peak_bytes - 1)
    message = str(error.value)
    assert "batch_size below 4" in message
    assert "score=lora" in message
    assert "precision=bf16" not in message
    assert "salient_only" not in message
    with pytest.raises(RecipeError) as error:  # no smaller batch would do
        enough(p, p.state_bytes // 2)
    assert "batch_size" not in str(error.value)
    assert Settings(full_size.with_keys(recipe, "lora", "bf16", True)).remedies(1) == (("state", "ema=0"),)


def test_a_network_that_is_not_known():
    with pytest.raises(ModelError, match="no prediction for a Transformer2DModel"):
        predict(load_recipe(None), {"_class_name": "Transformer2DModel"})


def test_measured_peak_sees_what_autograd_keeps():
    x = torch.zeros(1000, requires_grad=True)
    with measured_peak(torch.device("cpu"), [x]) as peak:
        y = x.exp().sin().sum()  # exp keeps its result, sin its argument: one tensor, and the result of sin
        del y
    assert 3 * 4000 <= peak.bytes < 4 * 4000


@pytest.mark.slow
def test_full_size_counts_an_iteration():
    recipe = full_size.with_keys(load_recipe(None, ["batch_size=2", "mask.density=0.1"]))
    found = full_size.measure(TEXT, "epsilon", recipe, 1, torch.device("cpu"))
    assert found["images_per_s"] == pytest.approx(8 / found["iteration_ms"] * 1e3)
    assert found["predicted_bytes"] == pytest.approx(found["peak_bytes"], rel=0.15)
    assert sum(part["share"] for part in found["parts"].values()) == pytest.approx(1)
    flops = full_size.network_flops(TEXT)
    assert found["flops"] == full_size.iteration_flops(flops, 2)
