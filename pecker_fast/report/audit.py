"""What an audit found, for the terminal and the page. The record is read as JSON: whatever it lacks stays empty."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from pecker_fast.report.text import NONE, figure, number, section

if TYPE_CHECKING:
    from rich.table import Table

RESULT = "result"
SAID = {
    "holds": "below a model that never knew it, or nothing comes back",
    "as if never known": "not told apart from a model that never knew it",
    "hides": "more comes back than from a model that never knew it",
    "cannot tell": "no control, or a model that never knew gives back as much as one that only hides",
    "kept": "neighbours are drawn as before",
    "lost": "neighbours are drawn wrong more often than before",
}


def subjects(audit: Mapping[str, Any]) -> list[str]:
    """Names of what was looked at, the result first."""
    return list(section(section(audit, "identity"), "subjects"))


def shown(found: Mapping[str, Any]) -> str:
    """What came back from one subject: "98.5 % (96.7–99.3)"."""
    value, between = found.get("recovery"), found.get("interval")
    if number(value) is None or not isinstance(between, list) or len(between) != 2:
        return NONE
    return f"{figure(value, True)} ({100 * between[0]:.1f}–{100 * between[1]:.1f})"


def audit_table(audit: Mapping[str, Any]) -> Table:
    """A row for each probe: what comes back from the result and from each control, and the verdict."""
    from rich.table import Table

    names = subjects(audit)
    table = Table(caption=_caption(audit), caption_justify="left")
    table.add_column("comes back under attack")
    for name in names:
        table.add_column(name, justify="right", style="bold" if name == RESULT else "")
    table.add_column("verdict")
    for probe, found in section(audit, "probes").items():
        by = section(found, "figures")
        table.add_row(probe, *(shown(section(by, name)) for name in names), str(found.get("verdict") or NONE))
    return table


def _caption(audit: Mapping[str, Any]) -> str:
    identity = section(audit, "identity")
    budget, judges = section(identity, "budget"), identity.get("judges")
    agree = "both judges see the concept" if judges == 2 else "one judge sees the concept (there is no second)"
    return (
        f"share of samples in which {agree}, worst variant, 95 % interval; budget {budget.get('name')}, "
        f"seed {identity.get('seed')}; neighbours: share drawn wrong"
    )


def audit_section(audit: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """The body of the page's section. images: PNG of "PROBE-SUBJECT"."""
    if not section(audit, "probes"):
        return ""
    said = str(audit.get("verdict") or "the audit is not finished")
    lead = f"<p class='lead'>{escape(said[0].upper() + said[1:])}.</p>"
    parts = [lead, _table(audit), _curves(audit), _rows(audit, images)]
    return "".join(part for part in parts if part)


def _table(audit: Mapping[str, Any]) -> str:
    names, rows = subjects(audit), []
    for probe, found in section(audit, "probes").items():
        by = section(found, "figures")
        cells = "".join(
            f"<td{' class=after' if name == RESULT else ''}>{_cell(section(by, name))}</td>" for name in names
        )
        verdict = str(found.get("verdict") or NONE)
        why = escape(str(found.get("why") or ""))
        rows.append(
            f"<tr><th scope='row'>{escape(probe)}<small>{escape(str(found.get('says', '')))}</small></th>{cells}"
            f"<td class='said'><b>{escape(verdict)}</b><small>{why}</small></td></tr>"
        )
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in names)
    return (
        f"<div class='scroll'><table class='audit'><caption>{escape(_caption(audit))}.</caption><thead><tr><td></td>{head}"
        f"<th scope='col' class='said'>verdict</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(found: Mapping[str, Any]) -> str:
    value, _, between = shown(found).partition(" (")
    return escape(value) + (f"<small>{escape(between.rstrip(')'))}</small>" if between else "")


def _curves(audit: Mapping[str, Any]) -> str:
    """Recovery against steps, of each probe that fits something."""
    from pecker_fast.report import figures  # matplotlib is imported when it is first needed

    drawn = []
    for probe, found in section(audit, "probes").items():
        by = section(found, "figures")
        best = {name: _worst_curve(section(by, name)) for name in subjects(audit)}
        svg = figures.recovery_curves({name: curve for name, curve in best.items() if len(curve) > 1}, probe)
        if svg:
            drawn.append(f"<figure>{svg}</figure>")
    return f"<div class='figures'>{''.join(drawn)}</div>" if drawn else ""


def _worst_curve(found: Mapping[str, Any]) -> list[tuple[float, float]]:
    curve = section(found, "curves").get(str(found.get("worst")), [])
    return [(float(x), float(y)) for x, y in curve] if isinstance(curve, list) else []


def _rows(audit: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """What came back: a row of images for each subject of each probe."""
    blocks = []
    for probe in section(audit, "probes"):
        rows = []
        for name in subjects(audit):
            data = images.get(f"{probe}-{name.replace(' ', '_')}")
            if data is not None:
                source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
                alt = escape(f"{probe}: images of {name}", quote=True)
                rows.append(f"<figure><h3>{escape(name)}</h3><img src='{source}' alt='{alt}'></figure>")
        if rows:
            blocks.append(f"<h3>{escape(probe)}</h3><div class='figures'>{''.join(rows)}</div>")
    return f"<details><summary>What came back, in pictures</summary>{''.join(blocks)}</details>" if blocks else ""
