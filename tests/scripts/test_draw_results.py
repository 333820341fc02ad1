"""The figure of the divergences is drawn from the table of docs/results.md as it stands."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))

from draw_results import PAGE, Score, draw, rows

from fdistill.divergence import DIVERGENCES


def test_every_row_of_the_table_is_read_and_every_divergence_drawn() -> None:
    found = rows(PAGE.read_text(encoding="utf-8"))
    by_name = {row.name: row for row in found}
    assert len(by_name) == len(found) > 20
    assert by_name["f-distill reverse-kl"].distance == Score(0.899, 0.008)
    assert by_name["teacher"].recall == Score(0.908, 0.009)
    distance, plane = draw(found).axes
    assert {label.get_text() for label in distance.get_yticklabels()} == set(DIVERGENCES)
    assert sum(len(lines[0].get_xdata()) for lines in plane.containers) == len(found)
