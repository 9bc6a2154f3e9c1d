"""Where a mask lets the forget gradient through: a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from pecker_fast.files import check_picture, write_bytes
from pecker_fast.report.mask import Mask, by_block, mask_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_mask(mask: Mask, path_png: str | Path) -> Path:
    """Draw the density of each block and of each layer into a PNG; returns its path.

    Raises:
        OutputError: the file cannot be written, or something that is no picture is there.
    """
    from matplotlib import rc_context

    from pecker_fast.report.figures import STYLE, draw_blocks, draw_layers, new_figure

    rows, path = mask_table(mask), check_picture(path_png)
    blocks = by_block(rows)
    with rc_context(STYLE):
        height = 1.2 + 0.26 * len(blocks)
        figure: Figure = new_figure(8.0, height + 2.6)
        top, bottom = figure.subplots(2, 1, height_ratios=[height, 2.2])
        draw_blocks(top, blocks, mask.density)
        draw_layers(bottom, rows, mask.density)
        figure.suptitle(
            f"{mask.count:,} of {mask.total:,} weights ({mask.density:.1%}), structure {mask.structure}", fontsize=11
        )
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=120)
    write_bytes(path, drawn.getvalue())
    return path
