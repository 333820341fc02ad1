"""A statistics file made from images, which then need not be read again; `fdistill reference`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.extractors import Extractor, open_extractor
from evaluation.images import Images, open_views
from evaluation.metrics.metric import Metric
from evaluation.protocols import get_protocol
from evaluation.reference import Reference
from evaluation.setting import Setting
from evaluation.statistics_files import Origin, write_statistics
from evaluation.weights import Weights
from fdistill.base import rng
from fdistill.base.devices import start
from fdistill.base.errors import ArgumentError
from fdistill.base.files import check_file
from fdistill.data.account import say

__all__ = ["make_reference"]


def make_reference(
    data: str | Path,
    *,
    output: str | Path,
    protocol: str = "digits",
    metrics: Sequence[str] | None = None,
    weights: Weights | None = None,
    batch_size: int = 64,
    device: str = "auto",
    allow_skipped: bool = False,
) -> Path:
    """Writes an .npz that `evaluate` takes as reference; "mu" and "sigma" of Inception's features are where other tools
    look for them.

    Args:
        data: images, from any place that `fdistill.data` opens. They are prepared as the protocol prepares its
            reference.
        output: an .npz file.
        protocol: a key of `evaluation.protocols.PROTOCOLS`.
        metrics: the metrics to compute from the file. Distances such as fid need mean and covariance; metrics such as
            recall need the features of every image, which make the file large. By default those of the protocol's
            default metrics that need only mean and covariance.
        weights, batch_size, device, allow_skipped: as in `evaluate`.

    Returns:
        The path of the file.

    Raises:
        ArgumentError, CheckpointError, DataError: images or weights cannot be used, or no metric needs a reference.
        OutputError: the file cannot be written.
    """
    chosen, path = get_protocol(protocol), Path(output)
    if path.suffix != ".npz":
        raise ArgumentError(f"output {output}: expected the name of an .npz file")
    check_file(path)
    _, on = start(device)
    setting = Setting(chosen, on, metrics, batch_size, weights or {})
    known = chosen.names()
    wanted = [known[name] for name in metrics or chosen.default if metrics or known[name].against == "moments"]
    of_moments, of_rows = _labels(wanted, "moments"), _labels(wanted, "rows")
    every = list(dict.fromkeys([*of_moments, *of_rows]))
    if not every:
        raise ArgumentError(
            f"metrics: {', '.join(metrics or chosen.default)} need no reference; expected one that does"
        )
    views = open_views(data, chosen.reference_views(), channels=chosen.channels, allow_skipped=allow_skipped)
    account = views[""].account
    if account is not None:
        say(f"data {data}", account.sentence())
    extractors = {label: open_extractor(label.partition("@")[0], on, setting.weights) for label in every}
    _check_count(data, len(views[""]), {label: extractors[label] for label in of_moments})
    reference, extraction = Reference(str(data), views, None, False), setting.extraction("reference")
    some = {label: extractors[label] for label in of_rows}
    rows = dict(reference.rows(some, extraction)) if some else {}  # copied, as moments may add further rows
    moments = reference.moments(extractors, extraction)
    if rng.world()[0] == 0:
        images = views[""]
        origin = Origin(
            protocol=chosen.name,
            extractors={label: {"sha256": e.sha256, "preparation": e.preparation} for label, e in extractors.items()},
            count=len(images),
            resolution=_side(images),
            source=images.name,
            source_sha256=images.sha256(),
            read=None if account is None else account.facts(),
        )
        write_statistics(path, moments, origin, rows or None)
    return path


def _labels(metrics: Sequence[Metric], against: str) -> list[str]:
    """Extractors, as "extractor" or "extractor@view", whose moments or rows the metrics read of a reference."""
    return list(dict.fromkeys(key.split(".")[0] for m in metrics if m.against == against for key in m.features))


def _check_count(data: str | Path, count: int, extractors: Mapping[str, Extractor]) -> None:
    """Raises ArgumentError if there are too few images for the covariance of these extractors' features."""
    for extractor in extractors.values():
        width = max(extractor.outputs.values())
        if count <= width:
            raise ArgumentError(
                f"data {data}: {count} images, and the covariance of {width} features needs more than {width}; pass "
                "more, or metrics that read single images, such as recall"
            )


def _side(images: Images) -> int | None:
    """The side of square images in pixels; None for others."""
    width, _, height = str(images.facts["resolution"]).partition("x")
    return int(width) if width == height else None
