"""Names beside the points of a plot, where they cover neither one another nor a point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_Point = tuple[float, float]
_Array = NDArray[np.float64]  # of points [N, 2], or of boxes [N, 4]: left, bottom, right, top

# All lengths are in points of 1/72 inch.
_DISTANCES = (8, 12, 17, 23, 30, 38, 48, 60, 74, 90, 108, 128)  # of a name from its point
_ANGLES = (0, 180, *(sign * angle for angle in range(15, 166, 15) for sign in (1, -1)))  # in degrees, best liked first
_MARKER = 4.5  # half a point's side
_LINE_FROM = 13  # a name so far off has a line to its point, and so has every name of a point with another so near
_MARGIN = 1.2  # around names, lines and bars
_LINE = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
_TURNS = 10


class _Place(NamedTuple):
    """Where a name may be.

    Attributes:
        offset: of its lower left corner from its point.
        facing: which corner or middle of an edge is nearest to it, as shares of width and height.
        boxes: its own, then those along the line to its point.
        cost: what speaks against it, other names apart.
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
    """Writes names[i] near points[i], and on none of the vertical `bars` (x, low, high), in a font of `size` points.

    In a few turns each name takes the place that covers least and is nearest, given where the others are. The axes must
    have their final limits and place in the figure.
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
    """All places of a name of this size around its point, the cheapest first."""
    found = []
    for distance in _DISTANCES:
        line = distance >= _LINE_FROM
        if crowded and not line:
            continue
        for angle in _ANGLES:
            towards = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
            # The corner or the middle of the edge that faces the point is so far from it.
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
    """Of places in the order of their cost, the cheapest where other names and lines have these boxes."""
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
    """What a name and its line cover of others; by a name it is worse."""
    return 10 * _overlap(boxes[:1], others) + _overlap(boxes[1:], others)


def _overlap(boxes: _Array, others: _Array) -> float:
    """The area that they share, summed over pairs."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return float((high - low).clip(0).prod(axis=2).sum())
