"""`pecker-fast pretrain shapes`: a text-to-image pipeline of Stable Diffusion's own classes, small enough to train here."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pecker_fast import draws, files
from pecker_fast.data import captions, random_words, render
from pecker_fast.errors import RecipeError, memory_errors
from pecker_fast.evaluate import WordJudge, disagreement, fid, fid_floor, load_second_judge
from pecker_fast.networks import load_schedule
from pecker_fast.pretrain import memory, taken
from pecker_fast.pretrain import output as folders
from pecker_fast.pretrain.rounds import distil
from pecker_fast.pretrain.settings import Settings, options, with_size
from pecker_fast.pretrain.shapes.folder import read_network, write_pipeline
from pecker_fast.pretrain.shapes.judge import check_fit, first, quantise, second, train_judge
from pecker_fast.pretrain.shapes.settings import LENGTH, SIZE, ShapesSettings
from pecker_fast.pretrain.shapes.tokenizer import build_tokenizer, caption_words
from pecker_fast.pretrain.shapes.unet import Captioned, train_teacher, unet_config
from pecker_fast.pretrain.shapes.vae import build_vae, encode, psnr_db, train_vae
from pecker_fast.pretrain.without import Without, missing_words, option, shows_none

__all__ = ["ShapesSettings", "draw", "measure", "obedience", "pretrain_shapes"]

MOST_LEVELS = 4  # of the UNet: latents are 8×8
POOL_BYTES = 4 * 3 * SIZE * SIZE  # of a picture as it is drawn
CAPTIONS, HELD_OUT = "captions.txt", "held_out.txt"


@memory_errors(memory.LIGHTER)
def pretrain_shapes(
    output: str | Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    distill_steps: int | None = None,
    *,
    settings: ShapesSettings | None = None,
    batch_size: int | None = None,
    channels: tuple[int, ...] | None = None,
    without: Without = (),
    parts_of: str | Path | None = None,
) -> Path:
    """Train VAE, text encoder, UNet and judge on drawn shapes, and write them as a StableDiffusionPipeline folder.

    output: folder to write, new or empty; None = `runs/pretrain-shapes`. A folder in which the same command was
        interrupted is continued: finished parts are kept, the UNet goes on from its last saved step.
    steps: training steps of UNet and text encoder; None = the settings' own.
    distill_steps: steps of distilling a one-step generator beside them, 0 = none; None = the settings' own.
    settings: replaces the settings. batch_size: captions of a step of UNet and text encoder. channels: of each level of the UNet.
    without: words that text encoder, UNet and generator never get to know: no caption that names one of them, no picture that
        shows it. VAE and judges know them.
    parts_of: model whose VAE and judges are taken over, see `taken.parts_of`.

    Returns the folder. Raises `OutputError`, `RecipeError`, `CheckpointError` and, after a signal, `Interrupted`.
    """
    settings = settings or ShapesSettings()
    if steps is not None:
        settings = replace(settings, teacher=replace(settings.teacher, steps=steps))
    settings = _resized(settings, batch_size, channels)
    missing = missing_words(without)
    distill_steps = settings.distill_steps if distill_steps is None else distill_steps
    for key, value, least in (
        ("steps", settings.teacher.steps, 1),
        ("seed", seed, 0),
        ("distill_steps", distill_steps, 0),
    ):
        if not least <= value < 1 << 63:
            raise RecipeError(f"{key}: {value} is out of range, a number from {least} and below 2^63 expected")
    folder = Path(output) if output is not None else Path("runs") / "pretrain-shapes"
    others = None if parts_of is None else taken.parts_of(parts_of, (taken.VAE, *taken.JUDGES))
    if others:
        _check_fit(others, settings, seed)
    memory.check(lambda teacher: _memory_config(settings, teacher), settings.teacher, settings.pool * POOL_BYTES)
    command = f"pecker-fast pretrain shapes --steps {settings.teacher.steps} --seed {seed} "
    command += f"--distill-steps {distill_steps}{options(batch_size, channels)}{option(missing)}{others.option() if others else ''}"
    with folders.claimed(folder):
        identity: dict[str, Any] = {
            "name": "shapes",
            "seed": seed,
            "settings": json.loads(json.dumps(asdict(settings))),
        }
        given: dict[str, Any] = {"without": list(missing)} if missing else {}
        given |= {"parts_of": others.told()} if others else {}
        if not folders.claim_for(folder, identity | given, command):
            told = {
                "command": command,
                "seed": seed,
                **given,
                "settings": identity["settings"],
                "versions": _versions(),
            }
            if others:
                others.copy_to(folder)
            _make(folder, settings, seed, distill_steps, {"name": "shapes", "kind": "teacher", **told})
        folders.finish(folder)
    return folder


def _make(folder: Path, settings: ShapesSettings, seed: int, distill_steps: int, card: dict[str, Any]) -> None:
    """Train and write all parts of the model, or go on with them, and model.json, which says of them what is in `card` too."""
    begun = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, split in ((CAPTIONS, "train"), (HELD_OUT, "held_out")):
        files.write_text(folder / name, "\n".join(captions(split)) + "\n")
    tokenizer = build_tokenizer(caption_words(), LENGTH)
    write_pipeline(folder, tokenizer)

    words = random_words(settings.pool, seed)
    pool = quantise(render(words, torch.arange(len(words)), seed))
    vae = train_vae(folder / "vae", pool, settings, seed, device)
    vae_info = {"psnr_db": psnr_db(vae, pool[:2000]), "scaling_factor": vae.config.scaling_factor}
    judge, other = (
        train_judge(folder, vae, pool, words, settings, plan(settings, seed), seed, device) for plan in (first, second)
    )
    missing = card.get("without", [])
    known = shows_none(words, missing)
    data = Captioned(encode(vae, pool[known]), words[known], tokenizer)
    card["data"] = {
        "pictures": len(data.latents),
        "sha256": files.hash_of({"pictures": pool[known], "words": words[known]}),
    }
    schedule = load_schedule(folder / "scheduler")
    resumed_from = train_teacher(folder, data, tokenizer, schedule, settings, seed, device)

    if distill_steps:
        distil(folder, settings.distill, distill_steps, seed, torch.float16, missing)
    figures = {
        "vae": vae_info,
        "judge": judge.info,
        "second_judge": other.info,
        **measure(folder, judge, settings, seed, missing),
    }
    card |= {"figures": figures, "time_s": round(time.monotonic() - begun, 1), "resumed_from": resumed_from}
    files.write_json(folder / folders.MODEL, card)


def _check_fit(others: taken.Taken, settings: ShapesSettings, seed: int) -> None:
    """Raises ModelError where VAE or judges of another model are not those of shapes."""
    for part in others.sha256:
        if part == taken.VAE:
            read_network(build_vae(settings, seed), others.folder / part)
        else:
            check_fit(others.folder / part)


def _resized(settings: ShapesSettings, batch_size: int | None, channels: tuple[int, ...] | None) -> ShapesSettings:
    """Another batch and width of the UNet. Raises `RecipeError`."""
    teacher = with_size(settings.teacher, batch_size)
    if channels is None:
        return replace(settings, teacher=teacher)
    with_size(settings.teacher, None, channels)
    head = settings.unet_head_dim
    if len(channels) > MOST_LEVELS or any(width % head for width in channels):
        given = ",".join(map(str, channels))
        raise RecipeError(
            f"channels: {given}: shapes takes up to {MOST_LEVELS} levels, multiples of {head}, such as 32,64"
        )
    return replace(settings, teacher=teacher, unet_channels=channels)


def _memory_config(settings: ShapesSettings, teacher: Settings) -> dict[str, Any]:
    """The UNet's config, as wide as `teacher` asks for, and the tokens of a caption."""
    wide = replace(settings, unet_channels=teacher.channels or settings.unet_channels)
    return {**unet_config(wide), "tokens": LENGTH}


def measure(
    folder: Path, judge: WordJudge, settings: ShapesSettings, seed: int, without: Sequence[str] = ()
) -> dict[str, Any]:
    """How well the stored pipeline obeys held-out captions, drawn by stock diffusers and seen by the stored judge.

    For each guidance: the share of samples with the word of the caption, for each attribute and for `all` of them, and
    `fid` against the judge's reference. `fid_floor`: halves of the reference against each other.
    Captions and reference pictures with a word of `without` are left out; what is drawn for such captions is in `asked_for`.
    """
    second = load_second_judge(folder)
    real = judge.reference_features(
        {name: [w for w in group if w in without] for name, group in judge.attributes.items()}
    )
    texts = [text for text in captions("held_out") if not set(judge.expected(text).values()) & set(without)]
    prompts = _spread(texts, settings.samples)

    def apart(images: torch.Tensor) -> dict[str, Any]:
        return {} if second is None else {"disagreement": disagreement(judge, second, images)}

    figures = {}
    for guidance in settings.guidances:
        images = draw(folder, prompts, guidance, settings.sampler_steps, seed)
        row = obedience(judge, prompts, images)
        figures[f"guidance {guidance:g}"] = row | {"fid": fid(real, judge.features(images))} | apart(images)
    found: dict[str, Any] = {"teacher": figures}
    if (folder / "generator").is_dir():
        images = draw(folder, prompts, 1.0, 1, seed, t_init=settings.t_init)
        found["one step"] = (
            obedience(judge, prompts, images) | {"fid": fid(real, judge.features(images))} | apart(images)
        )
    if without:
        found["asked_for"] = {word: _asked_for(folder, judge, word, settings, seed) for word in without}
    return {
        **found,
        "samples": settings.samples,
        "sampler": f"DDIM, {settings.sampler_steps} steps",
        "captions": "held out",
        "fid_floor": fid_floor(real, torch.zeros(len(real), dtype=torch.long), seed),
        "reference_samples": len(real),
    }


def _spread(texts: list[str], n: int) -> list[str]:
    return [texts[i * len(texts) // n % len(texts)] for i in range(n)]


def _asked_for(folder: Path, judge: WordJudge, word: str, settings: ShapesSettings, seed: int) -> dict[str, Any]:
    """What is seen where held-out captions name `word`: the share of each word of its attribute, by teacher and guidance and of
    the one-step generator."""
    attribute = next(name for name, group in judge.attributes.items() if word in group)
    texts = [text for text in captions("held_out") if judge.expected(text).get(attribute) == word]
    prompts = _spread(texts, settings.samples)

    def seen(images: torch.Tensor) -> dict[str, float]:
        words = judge.seen(images)[attribute]
        return {name: words.count(name) / len(words) for name in judge.attributes[attribute]}

    drawn = {
        f"teacher, guidance {guidance:g}": seen(draw(folder, prompts, guidance, settings.sampler_steps, seed))
        for guidance in settings.guidances
    }
    if (folder / "generator").is_dir():
        drawn["one step"] = seen(draw(folder, prompts, 1.0, 1, seed, t_init=settings.t_init))
    return drawn


def obedience(judge: WordJudge, prompts: list[str], images: torch.Tensor) -> dict[str, float]:
    """Share of images that show the word their prompt names: of each attribute, and `all`, of all that is named."""
    seen = judge.seen(images)
    wanted = [judge.expected(prompt) for prompt in prompts]
    shares = {}
    for name in judge.attributes:
        right = [seen[name][i] == want[name] for i, want in enumerate(wanted) if name in want]
        shares[name] = sum(right) / max(1, len(right))
    whole = [all(seen[name][i] == word for name, word in want.items()) for i, want in enumerate(wanted)]
    return shares | {"all": sum(whole) / max(1, len(whole))}


def draw(
    folder: Path,
    prompts: list[str],
    guidance: float,
    steps: int,
    seed: int,
    batch: int = 100,
    t_init: int | None = None,
) -> torch.Tensor:
    """Images float32 `[n, 3, H, W]` in [-1, 1], one for each prompt, by stock diffusers from the folder's own files.

    t_init: the one-step generator beside the teacher draws, at this timestep.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel

    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
    )
    at: dict[str, Any] = {"num_inference_steps": steps}
    if t_init is not None:
        at["timesteps"] = [t_init]
        pipeline.unet = UNet2DConditionModel.from_pretrained(folder / "generator", use_safetensors=True)
        trailing = {"timestep_spacing": "trailing"}
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **trailing)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        noise = draws.generator(seed, "shapes-draw", start)
        answer = pipeline(some, **at, guidance_scale=guidance, generator=noise, output_type="pt")
        parts.append(2 * answer.images.float().cpu() - 1)
    return torch.cat(parts)


def _versions() -> dict[str, str]:
    import diffusers
    import transformers

    return {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}
