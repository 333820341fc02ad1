"""Names beside the points of a plot, placed so that they cover neither points nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_Point = tuple[float, float]
_Array = NDArray[np.float64]  # points [N, 2], or boxes [N, 4]: left, bottom, right, top

# All lengths are in points of 1/72 inch.
_DISTANCES = (8, 12, 17, 23, 30, 38, 48, 60, 74, 90, 108, 128)  # that are tried between a point and its name
_ANGLES = (
    0,
    180,
    *(sign * angle for angle in range(15, 166, 15) for sign in (1, -1)),
)  # in degrees, the preferred ones first
_MARKER = 4.5  # half the side of a point's marker
_LINE_FROM = 13  # a name this far from its point gets a line to it; so do names of points this near to each other
_MARGIN = 1.2  # kept free around names, lines and bars
_LINE = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
_TURNS = 10  # rounds in which every name may move


class _Place(NamedTuple):
    """A place where a name may stand.

    Attributes:
        offset: from the point to the lower left corner of the name.
        facing: the corner or the middle of an edge that is nearest to the point, as shares of width and height.
        boxes: the name's box, then boxes along the line to its point.
        line: whether there is such a line.
        cost: how bad the place is without regard to other names.
    """

    offset: _Point
    facing: _Point
    boxes: _Array
    line: bool
    cost: float


def place_labels(
    axes: Any,
    points: Sequence[_Point],
    names: Sequence[str],
    colours: Sequence[Any],
    bars: Sequence[tuple[float, float, float]],
    size: float,
) -> None:
    """Writes names[i] near points[i], in a font of `size` points, and not across the vertical `bars` (x, low, high).

    In each of a few rounds every name moves to the nearest place that covers least, given where the other names are.
    The axes must have their final limits and their final place in the figure.
    """
    renderer = axes.figure.canvas.get_renderer()
    scale = 72 / axes.figure.dpi
    ends = [(x, low) for x, low, _ in bars], [(x, high) for x, _, high in bars]
    centres, low, high = (axes.transData.transform(np.reshape(at, (-1, 2))) * scale for at in (points, *ends))
    frame = np.array(axes.get_window_extent(renderer).extents) * scale
    fixed = np.concatenate([_squares(centres, _MARKER), np.hstack([low - _MARGIN, high + _MARGIN])])
    places = []
    for i, name in enumerate(names):
        text = axes.text(0, 0, name, fontsize=size, parse_math=False)
        extent = text.get_window_extent(renderer)
        text.remove()
        near = np.linalg.norm(np.delete(centres, i, axis=0) - centres[i], axis=1)
        extents = np.array([extent.width, extent.height]) * scale
        places.append(_places(centres[i], extents, bool((near < _LINE_FROM).any()), fixed, frame))
    chosen = [found[0] for found in places]
    for turn in range(_TURNS):
        for i in list(range(len(places)))[:: -1 if turn % 2 else 1]:
            others = np.concatenate([np.empty((0, 4)), *(place.boxes for j, place in enumerate(chosen) if j != i)])
            chosen[i] = _best(places[i], others)
    for name, point, colour, place in zip(names, points, colours, chosen, strict=True):
        axes.annotate(
            name,
            point,
            place.offset,
            textcoords="offset points",
            va="bottom",
            parse_math=False,
            fontsize=size,
            color=colour,
            arrowprops={**_LINE, "color": colour, "relpos": place.facing} if place.line else None,
            annotation_clip=False,
        ).set_in_layout(False)


def _places(centre: _Array, size: _Array, crowded: bool, fixed: _Array, frame: _Array) -> list[_Place]:
    """All places for a name of this size around its point, the cheapest first."""
    found = []
    for distance in _DISTANCES:
        line = distance >= _LINE_FROM
        if crowded and not line:
            continue
        for angle in _ANGLES:
            towards = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
            # `distance` is between the point and the corner or middle of an edge that faces it.
            share = np.where(abs(towards) < 0.2, 0.5, (towards < 0).astype(float))
            offset = distance * towards - share * size
            corner = centre + offset
            box = np.concatenate([corner - _MARGIN, corner + size + _MARGIN])
            steps = np.arange(_MARKER + _MARGIN, distance if line else 0, 2)
            boxes = np.concatenate([box[None], _squares(centre + steps[:, None] * towards, _MARGIN)])
            inside = _overlap(box[None], frame[None])
            outside = (box[2] - box[0]) * (box[3] - box[1]) - inside
            cost = _covered(boxes, fixed) + 10 * outside + distance / 20
            found.append(_Place(tuple(offset.tolist()), tuple(share.tolist()), boxes, line, cost))
    return sorted(found, key=lambda place: place.cost)


def _best(places: Sequence[_Place], others: _Array) -> _Place:
    """The cheapest of places (sorted by cost) if other names and lines have the boxes `others`."""
    best, lowest = places[0], np.inf
    for place in places:
        if place.cost >= lowest:
            break
        cost = place.cost + _covered(place.boxes, others)
        if cost < lowest:
            best, lowest = place, cost
    return best


def _squares(centres: _Array, half: float) -> _Array:
    return np.concatenate([centres - half, centres + half], axis=1)


def _covered(boxes: _Array, others: _Array) -> float:
    """The area that a name and its line cover of others; a name's counts ten times."""
    return 10 * _overlap(boxes[:1], others) + _overlap(boxes[1:], others)


def _overlap(boxes: _Array, others: _Array) -> float:
    """The area that boxes share with others, summed over all pairs."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return float((high - low).clip(0).prod(axis=2).sum())
