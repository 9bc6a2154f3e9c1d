"""Names that users and their files depend on. Changing one is a decision, told in the changelog, not an accident."""

import inspect

import pytest
import typer

import pecker_fast
from pecker_fast.cli import app
from pecker_fast.recipe import Recipe, methods, recipe_help

KEYS_TEXT = """
model revision model_config method forget cover retain null_class steps distill_steps generator batch_size lr.generator lr.score
lr.warmup alpha timesteps.init timesteps.min timesteps.max
images.source images.samples images.steps images.guidance objective.eta objective.ewc objective.ridge objective.crucial
guidance.score_train guidance.score guidance.teacher
guidance.text_dropout guidance.unconditional detach_score weights.score_retain weights.score_forget weights.retain
weights.forget mask.source mask.score mask.contrast mask.density mask.threshold mask.structure mask.tile mask.scope
mask.reduction mask.samples mask.data mask.timesteps mask.skip mask.refresh mask.only mask.exclude
adversary.conditions adversary.tokens adversary.steps adversary.rate adversary.restart adversary.share adversary.half_way
adversary.starts adversary.batch adversary.samples update_rule optimizer.betas optimizer.eps
optimizer.weight_decay optimizer.clip_value ema precision resolution score student lora.rank lora.targets engine.zero
engine.offload engine.shard_teacher engine.deepspeed engine.stall_s engine.compile engine.cuda_graph
engine.channels_last engine.norms engine.threads engine.weights
engine.checkpointing engine.micro_batch evaluate.every evaluate.samples evaluate.final evaluate.judge evaluate.prompts
evaluate.teacher_steps audit.budget audit.probes audit.against audit.samples checkpoint.every checkpoint.keep seed output resume
"""
RECIPE_KEYS = KEYS_TEXT.split()

CHOICES = {
    "mask.source": "saliency | random | names | none",
    "mask.score": "mse | forget_loss",
    "mask.structure": "element | row | tile | tensor",
    "mask.scope": "global | tensor",
    "mask.reduction": "sum | abs | square",
    "mask.timesteps": "uniform | train | init",
    "mask.only": "list of text",
    "mask.exclude": "list of text",
    "adversary.starts": "list of forget | kept | random",
    "update_rule": "differentiated | salient_only | alternating",
    "precision": "fp32 | bf16",
    "score": "full | lora",
    "student": "full | lora",
    "engine.offload": "none | cpu",
    "engine.compile": "none | blocks",
    "engine.norms": "plain | fused",
    "engine.weights": "fp32 | bf16",
    "lora.targets": "all | attention",
    "audit.budget": "none | quick | standard | strong",
}

DEFAULTS = {
    "model": "digits", "method": "pecker", "forget": 0, "cover": 1, "retain": None, "steps": 500, "distill_steps": 0,
    "batch_size": 64, "lr.generator": 1e-4, "lr.score": 1e-4, "lr.warmup": 0, "alpha": 1.2, "timesteps.init": 440,
    "timesteps.min": 38, "timesteps.max": 712, "weights.score_retain": 1, "weights.score_forget": 1,
    "weights.retain": 1, "weights.forget": 1, "mask.source": "saliency", "mask.score": "mse", "mask.contrast": False,
    "mask.density": 0.5, "mask.threshold": None, "mask.structure": "element", "mask.tile": [128, 128],
    "mask.scope": "global", "mask.reduction": "sum", "mask.samples": 2048, "mask.data": "pseudo",
    "mask.timesteps": "uniform", "mask.skip": True, "mask.refresh": 0, "mask.only": [], "mask.exclude": [],
    "images.source": "pool", "images.samples": 256, "images.steps": 20, "images.guidance": 1.0,
    "objective.eta": 1.0, "objective.ewc": 10.0, "objective.ridge": 0.5, "objective.crucial": False,
    "adversary.conditions": 0, "adversary.tokens": 1, "adversary.steps": 1, "adversary.rate": 0.1, "adversary.restart": 15,
    "adversary.share": 0.5, "adversary.half_way": 0.0, "adversary.starts": ["forget", "kept"],
    "adversary.batch": 0, "adversary.samples": 512,
    "update_rule": "differentiated", "optimizer.betas": [0.0, 0.999],
    "optimizer.eps": 1e-8, "optimizer.clip_value": 1.0, "ema": 0.98, "precision": "fp32", "engine.zero": 0,
    "engine.shard_teacher": False, "engine.deepspeed": None, "engine.stall_s": 600,
    "engine.compile": "none", "engine.cuda_graph": False, "engine.channels_last": True, "engine.norms": "plain",
    "engine.threads": 0, "engine.weights": "fp32", "engine.checkpointing": False, "engine.micro_batch": 0,
    "revision": None, "resolution": None, "lora.rank": 16, "lora.targets": "all", "guidance.unconditional": None,
    "evaluate.prompts": None, "evaluate.every": 100, "evaluate.samples": 512, "evaluate.final": 2000,
    "checkpoint.every": 100, "checkpoint.keep": 2, "seed": 0, "output": "runs/digits", "resume": "auto",
}  # fmt: skip

COMMANDS = {
    "train": {"recipe", "overrides", "--tensorboard", "--dry-run", "--device", "--quiet", "-q"},
    "pretrain": {
        "name",
        "--data",
        "--output",
        "-o",
        "--steps",
        "--seed",
        "--distill-steps",
        "--size",
        "--batch-size",
        "--channels",
        "--without",
        "--parts-of",
    },
    "sample": {"run", "--classes", "--prompt", "--count", "--seed", "--output", "-o", "--before"},
    "evaluate": {
        "run",
        "--samples",
        "--seed",
        "--judge",
        "--protocol",
        "--prompts",
        "--detector",
        "--seeds",
        "--clip",
        "--before",
        "--all",
        "--json",
        "--keep",
    },
    "audit": {
        "run",
        "--probes",
        "--budget",
        "--against",
        "--samples",
        "--seed",
        "--prompts",
        "--second-judge",
        "--controls-of",
        "--recipe",
        "--output",
        "-o",
        "--json",
        "--quiet",
        "-q",
    },
    "compare": {"recipe", "overrides", "--methods", "--seeds", "--never", "--output", "-o", "--quiet", "-q"},
    "report": {"run"},
    "mask": {"run", "--plot"},
    "export": {"what", "--output", "-o", "--weights", "--format", "--rank", "--names"},
    "doctor": {"recipe", "overrides", "--device"},
    "bench": {"recipe", "overrides", "--iterations", "--json"},
    "recipes list": set(),
    "recipes show": {"name", "--all"},
    "recipes copy": {"name", "destination"},
    "recipes keys": set(),
    "recipes methods": set(),
}


METHODS = {
    "pecker": "one-step",
    "sfd": "one-step",
    "spare": "denoiser",
    "salun": "denoiser",
    "esd": "denoiser",
    "sa": "denoiser",
    "uce": "edit",
    "relabel": "edit",
}


def test_methods():
    assert {name: keys.kind for name, keys in methods().items()} == METHODS


def test_recipe_keys():
    assert [row[0] for row in recipe_help()] == RECIPE_KEYS


def test_recipe_choices_and_defaults():
    rows = {row[0]: row for row in recipe_help()}
    assert {key: rows[key][1] for key in CHOICES} == CHOICES
    assert {key: rows[key][2] for key in DEFAULTS} == DEFAULTS
    assert set(Recipe.model_fields) - {key.split(".")[0] for key in RECIPE_KEYS} == {"config_folder"}


def command_names(group, prefix=""):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from command_names(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def test_commands_and_their_options():
    found = {}
    for name, command in command_names(typer.main.get_command(app)):
        options = set()
        for parameter in command.params:
            options |= set(parameter.opts) - {"--help", "-h"}
        found[name] = options
    assert found == COMMANDS


def test_public_names():
    assert pecker_fast.__all__ == ["__version__", "unlearn"]
    assert list(inspect.signature(pecker_fast.unlearn).parameters)[:6] == [
        "model", "forget", "cover", "retain", "method", "output",
    ]  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        pecker_fast.unlern  # noqa: B018


def test_the_python_functions_behind_the_commands():
    from pecker_fast import pretrain, report
    from pecker_fast.runs import benchmark
    from pecker_fast.runs import finished as tools
    from pecker_fast.runs import start as run

    first = {
        run.train: ["recipe", "tensorboard", "quiet", "dry_run"],
        tools.sample_run: ["run_dir", "classes", "count", "seed", "output", "before", "prompts"],
        tools.evaluate_run: ["run_dir", "samples", "seed", "judge"],
        tools.export_run: ["run_dir", "output", "weights", "form"],
        report.write_report: ["run_dir"],
        report.run_tables: ["run_dir"],
        benchmark.bench: ["recipe", "iterations", "json_file"],
        pretrain.pretrain: ["name", "data", "output", "steps", "seed"],
    }
    for function, names in first.items():
        assert list(inspect.signature(function).parameters)[: len(names)] == names, function.__name__
