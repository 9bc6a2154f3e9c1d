"""The page: one function a section, each of which returns nothing where the run has nothing to say."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pecker_fast.report import figures
from pecker_fast.report.audit import audit_section
from pecker_fast.report.cost import NOTE, cells, facts, heads, known, lines, of_run
from pecker_fast.report.mask import by_block, mask_table
from pecker_fast.report.read import RunData
from pecker_fast.report.text import (
    COLUMNS,
    NONE,
    UNCOUNTED,
    Row,
    blanks,
    count,
    figure,
    interval,
    judge_line,
    number,
    ratio,
    rows_of,
    scaled,
    seconds,
    section,
    times,
    verdict_line,
)

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}</style>
</head>
"""
MANY_CLASSES = 40  # rows of the table of classes, at most
_GRIDS = (
    ("before", "Before", "one-step generator, before forgetting"),
    ("after", "After", "one-step generator, the result"),
    ("teacher", "Teacher", "multi-step sampler of the original model"),
)
_MANY_STEPS_GRIDS = (
    ("before", "Before", "the original model"),
    ("after", "After", "the result, by the same sampler"),
    ("teacher", "Teacher", "the original model"),
)


def build_page(run: RunData) -> str:
    """The whole report as HTML that needs no other file."""
    title = _title(run)
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    parts = [
        _cards(run),
        _notes(run),
        _verdict(run),
        _audit(run),
        _grids(run),
        _curves(run),
        _classes(run),
        _cost(run),
        _mask(run),
    ]
    parts += [_recipe(run), _versions(run)]
    body = "\n".join(part for part in parts if part)
    return (
        _HEAD.format(title=escape(title), style=style)
        + f"<body>\n<header>\n<h1>{escape(title)}</h1>\n{_summary(run)}{_tags(run)}</header>\n<main>\n{body}\n</main>\n"
        + f"<footer>pecker-fast · run folder {escape(run.folder.name)}</footer>\n</body>\n</html>\n"
    )


def _title(run: RunData) -> str:
    recipe = run.recipe
    if "forget" not in recipe:
        return f"Unlearning report: {run.folder.name}"
    forget, cover = _plain(recipe["forget"]), recipe.get("cover")
    return f"{recipe.get('model', 'model')}: forget {forget}" + ("" if cover is None else f", cover {_plain(cover)}")


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("concept", "a concept"))
    if isinstance(value, list):
        shown = ", ".join(str(item) for item in value[:6])
        return shown + (f" and {len(value) - 6} more" if len(value) > 6 else "")
    return str(value)


def _summary(run: RunData) -> str:
    """The result in one or two sentences, as far as it is known."""
    after, cost = section(run.metrics, "after"), section(run.metrics, "cost")
    if number(after.get("ua")) is None:
        return "<p class='lead'>There is no final evaluation of this run.</p>\n"
    text = f"{verdict_line(run.metrics, run.recipe.get('steps'))}. {figure(after['ua'], True)} of the samples drawn for what "
    text += "was to be forgotten are not judged to be it"
    if number(after.get("cover_rate")) is not None:
        text += f", {figure(after['cover_rate'], True)} show the cover class"
    if number(after.get("retain_accuracy")) is not None:
        text += f"; {figure(after['retain_accuracy'], True)} of the other classes' samples are still right"
    text += "."
    if ratio(run.metrics) is not None:
        of = "In one step their FID is" if run.one_step else "Their FID is"
        text += f" {of} {times(ratio(run.metrics))} that of the teacher's multi-step sampler."
    if number(cost.get("training_s")) is not None:
        text += f" Training took {seconds(cost['training_s'])}."
    return f"<p class='lead'>{escape(text)}</p>\n"


def _tags(run: RunData) -> str:
    recipe, tags = run.recipe, []
    if recipe.get("method"):
        tags.append(f"method {recipe['method']}")
    if recipe.get("update_rule") and run.mask is not None:
        tags.append(f"rule {recipe['update_rule']}")
    if run.mask is not None:
        tags.append(f"{run.mask.structure} mask, density {figure(run.mask.density, True)}")
    if recipe.get("seed") is not None:
        tags.append(f"seed {recipe['seed']}")
    if run.status:
        tags.append(run.status)
    return f"<ul class='tags'>{''.join(f'<li>{escape(str(tag))}</li>' for tag in tags)}</ul>\n" if tags else ""


def _cards(run: RunData) -> str:
    after, before = section(run.metrics, "after"), section(run.metrics, "before")
    cards = []
    for key, name, tone in (("ua", "Unlearning accuracy", "forget"), ("cover_rate", "Shows the cover", "cover"),
                            ("retain_accuracy", "Kept", "real")):  # fmt: skip
        if number(after.get(key)) is not None:
            was = [f"before {figure(before.get(key), True)}"] if number(before.get(key)) is not None else []
            between = [f"95 %: {interval(after, key)}"] if interval(after, key) != NONE else []
            cards.append((tone, name, figure(after[key], True), " · ".join(between + was)))
    if number(after.get("fid")) is not None:
        share = ratio(run.metrics)
        note = f"{times(share)} the teacher's" if share is not None else "retain classes"
        cards.append(("after", "FID, retain", figure(after["fid"], False), note))
    if not cards:
        return ""
    items = "".join(
        f"<div class='card' style='--tone:var(--{tone})'><dt>{escape(name)}</dt>"
        f"<dd class='value'>{escape(value)}</dd><dd class='faint'>{escape(note)}</dd></div>"
        for tone, name, value, note in cards
    )
    return f"<dl class='cards'>{items}</dl>"


def _notes(run: RunData) -> str:
    if not run.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    return f"<section class='notes'><h2>Could not be read</h2><ul>{items}</ul></section>"


def _verdict(run: RunData) -> str:
    columns = [column for column in COLUMNS if section(run.metrics, column)]
    if not columns:
        return _section(
            "Before and after", "<p>Nothing was evaluated: the model has no judge, or evaluation is off.</p>"
        )
    rows = []
    for row in rows_of(run.metrics):
        values = [_with_interval(section(run.metrics, column), row) for column in columns]
        rows.append(_row(f"{row.name} {row.better}", row.says, zip(columns, values)))
        if row.key == "fid" and ratio(run.metrics) is not None:
            shares = [times(ratio(run.metrics, column)) for column in columns]
            against = "one step against the multi-step sampler" if run.one_step else "by the same sampler"
            rows.append(_row("FID / teacher's ↓", against, zip(columns, shares)))
    for key, name, says in (("samples", "Samples", "of each group"), ("seed", "Seed", "of the noise")):
        counts = [count(section(run.metrics, column).get(key)) for column in columns]
        if set(counts) != {NONE}:
            rows.append(_row(name, says, zip(columns, counts)))
    head = "".join(f"<th scope='col'>{column}</th>" for column in columns)
    notes = [note[0].upper() + note[1:] for note in (*blanks(run.metrics), judge_line(run.metrics)) if note]
    caption = f"<caption>{escape('. '.join(notes))}.</caption>" if notes else ""
    table = f"<table>{caption}<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return _section("Before and after", f"<div class='scroll'>{table}</div>")


def _with_interval(figures: Mapping[str, Any], row: Row) -> str:
    value, between = figure(figures.get(row.key), row.fraction), interval(figures, row.key) if row.fraction else NONE
    return value if between == NONE or row.key in UNCOUNTED else f"{value} ({between})"


def _row(name: str, says: str, values: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<td class='{column}'>{escape(value)}</td>" for column, value in values)
    return f"<tr><th scope='row'>{escape(name)}<small>{escape(says)}</small></th>{cells}</tr>"


def _audit(run: RunData) -> str:
    body = audit_section(run.audit, run.audit_images)
    return _section("Hidden or forgotten", body) if body else ""


def _grids(run: RunData) -> str:
    if not run.grids:
        return ""
    named = {key: (title, says) for key, title, says in (_GRIDS if run.one_step else _MANY_STEPS_GRIDS)}
    shown = [key for key in named if key in run.grids]
    others = [key for key in run.grids if key not in named]
    body = (
        f"<div class='figures'>{''.join(_image(run.grids[key], *named[key], key) for key in shown)}</div>"
        if shown
        else ""
    )
    if others:
        images = "".join(_image(run.grids[key], key, "", "") for key in others)
        body += f"<details><summary>More grids ({len(others)})</summary><div class='figures'>{images}</div></details>"
    return _section("Samples at equal noise", "<p class='faint'>One class a row.</p>" + body)


def _image(data: bytes, title: str, says: str, tone: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    style = f" style='--tone:var(--{tone})'" if tone else ""
    alt = escape(f"Samples, one class a row: {title}", quote=True)
    caption = f"<figcaption>{escape(says)}</figcaption>" if says else ""
    return f"<figure{style}><h3>{escape(title)}</h3><img src='{source}' alt='{alt}'>{caption}</figure>"


def _curves(run: RunData) -> str:
    levels = (
        ("teacher, multi-step", section(run.metrics, "teacher").get("fid"), figures.TEACHER),
        ("real against real", section(run.metrics, "judge").get("fid_floor"), figures.REAL),
    )
    drawn = [
        figures.accuracy_curves(run.evaluations, run.distill_end),
        figures.fid_curve(run.evaluations, levels, run.distill_end),
        figures.loss_curves(run.steps, run.distill_end),
    ]
    body = "".join(f"<figure>{svg}</figure>" for svg in drawn if svg)
    return _section("Over the steps", f"<div class='figures'>{body}</div>") if body else ""


def _classes(run: RunData) -> str:
    """Accuracy of each class, before and after."""
    found = {column: section(section(run.metrics, column), "per_class") for column in COLUMNS}
    columns = [column for column in COLUMNS if found[column]]
    if not columns:
        return ""
    forget = run.recipe.get("forget")
    forgotten = {_plain(item) for item in (forget if isinstance(forget, list) else [forget])}
    names = sorted({name for column in columns for name in found[column]}, key=lambda name: (len(name), name))
    names, left = _most_changed(names, found, forgotten)
    rows = []
    for name in names:
        cells = "".join(
            f"<td class='{column}'>{_bar(found[column].get(name), column)}{figure(found[column].get(name), True)}</td>"
            for column in columns
        )
        marked = " class='marked'" if name in forgotten else ""
        rows.append(f"<tr{marked}><th scope='row'>{escape(name)}</th>{cells}</tr>")
    head = "".join(f"<th scope='col'>{column}</th>" for column in columns)
    table = f"<table><thead><tr><th scope='col'>Class</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    told = f" Shown are forgotten classes and those that changed most; {left} more are in metrics.json." if left else ""
    return _section(
        "Class by class", f"<p class='faint'>Samples judged as conditioned.{told}</p><div class='scroll'>{table}</div>"
    )


def _most_changed(
    names: Sequence[str], found: Mapping[str, Mapping[str, Any]], forgotten: Collection[str]
) -> tuple[list[str], int]:
    """At most `MANY_CLASSES` of the names, in their order, and how many are left out."""

    def change(name: str) -> tuple[bool, float]:
        before, after = (number(found[column].get(name)) for column in ("before", "after"))
        return name in forgotten, abs(before - after) if before is not None and after is not None else 0.0

    kept = set(sorted(names, key=change, reverse=True)[:MANY_CLASSES])
    return [name for name in names if name in kept], len(names) - len(kept)


def _bar(value: Any, tone: str) -> str:
    x = number(value)
    if x is None:
        return ""
    return f"<span class='bar' style='--v:{100 * min(max(x, 0.0), 1.0):.1f}%;--tone:var(--{tone})'></span>"


def _cost(run: RunData) -> str:
    cost = section(run.metrics, "cost")
    trained, images, flops = (number(cost.get(key)) for key in ("training_s", "images", "flops"))
    facts = [
        ("Training", seconds(trained)),
        ("With evaluation", seconds(cost.get("total_s"))),
        ("Generated images", count(images)),
        ("Images a second", count(images / trained) if images and trained else NONE),
        ("Operations", scaled(flops, "FLOP")),
        ("Speed", scaled(flops / trained, "FLOP/s") if flops and trained else NONE),
        ("Peak memory", scaled(cost.get("peak_memory_bytes"), "B", 1024)),
    ]
    body = _facts(facts) if any(value != NONE for _, value in facts) else ""
    return _section("Cost", body + _parts(section(cost, "parts"))) if body or section(cost, "parts") else ""


def _parts(account: Mapping[str, Any]) -> str:
    """One iteration, part by part."""
    if not account:
        return ""
    variants = of_run(account)
    rows = lines(variants)
    columns = known(rows)
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in heads(list(variants), columns))
    body = "".join(
        f"<tr{' class=faint' if line.within else ''}><th scope='row'>{escape(line.name)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells(line, columns))
        + "</tr>"
        for line in rows
    )
    below = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for name, *values in facts(variants)
    )
    names = "".join(f"<th scope='col'>{escape(name)}</th>" for name in variants)
    return (
        f"<h3>One iteration, part by part</h3><p class='faint'>{escape(NOTE)}</p>"
        f"<div class='scroll'><table class='layers'><thead><tr><th scope='col'>Part</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
        f"<div class='scroll'><table class='layers'><thead><tr><td></td>{names}</tr></thead><tbody>{below}</tbody></table></div>"
    )


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts if v != NONE)
    return f"<dl class='facts'>{items}</dl>"


def _mask(run: RunData) -> str:
    if run.mask is None:
        return ""
    mask, rows = run.mask, mask_table(run.mask)
    if not rows:
        return ""
    text = f"{mask.count:,} of {mask.total:,} weights ({figure(mask.density, True)}) take the forget gradient."
    proof = section(run.metrics, "outside_mask")
    if proof and proof.get("before_sha256") == proof.get("after_sha256"):
        text += f" The {count(proof.get('weights'))} others are bit for bit what they were at the start."
    plots = figures.mask_blocks(by_block(rows), mask.density), figures.mask_layers(rows, mask.density)
    lines = "".join(
        f"<tr><th scope='row'>{escape(row.name)}</th><td>{escape('×'.join(map(str, row.shape)) or 'scalar')}</td>"
        f"<td>{row.weights:,}</td><td>{row.kept:,}</td>"
        f"<td>{_bar(row.density, 'after')}{figure(row.density, True)}</td></tr>"
        for row in rows
    )
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("Tensor", "Shape", "Weights", "Kept", "Density"))
    table = f"<table class='layers'><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return _section(
        "Mask",
        f"<p>{escape(text)}</p><div class='figures'>{''.join(f'<figure>{svg}</figure>' for svg in plots)}</div>"
        "<p class='faint'>Dashed: the whole network.</p>"
        f"<details><summary>All {len(rows)} tensors</summary><div class='scroll'>{table}</div></details>",
    )


def _recipe(run: RunData) -> str:
    if not run.recipe_text:
        return ""
    return _section("Recipe", f"<details><summary>recipe.yaml</summary><pre>{escape(run.recipe_text)}</pre></details>")


def _versions(run: RunData) -> str:
    start, versions = run.start, run.start.get("versions")
    facts = [(str(k), str(v)) for k, v in versions.items()] if isinstance(versions, Mapping) else []
    facts += [(name, str(start[key])) for key, name in (("device", "device"), ("threads", "threads")) if start.get(key)]
    hashes = [(name, str(start[key])) for key, name in (("recipe_sha256", "Recipe"), ("base_sha256", "Base model"))
              if start.get(key)]  # fmt: skip
    if not facts and not hashes:
        return ""
    lines = "".join(f"<li class='faint'>{name} sha256 <code>{escape(value)}</code></li>" for name, value in hashes)
    return _section("Where it ran", _facts(facts) + (f"<ul class='hashes'>{lines}</ul>" if lines else ""))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"
