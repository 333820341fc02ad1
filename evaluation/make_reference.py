"""A file of statistics made of images, so that the images need not be at hand, or read, again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.extractors import open_extractor
from evaluation.images import Images, open_views
from evaluation.measure import Setting
from evaluation.protocols import get_protocol
from evaluation.reference import Against
from evaluation.statistics_files import write_reference
from evaluation.weights import Weights
from fdistill.base import rng
from fdistill.base.devices import start
from fdistill.base.errors import ArgumentError
from fdistill.base.files import check_file


def make_reference(
    data: str | Path,
    *,
    output: str | Path,
    protocol: str = "digits",
    metrics: Sequence[str] | None = None,
    weights: Weights | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> Path:
    """Writes what samples of a protocol are measured against: an .npz that `evaluate` takes as reference, with "mu" and
    "sigma" of Inception's features where other tools look for them.

    Args:
        data: images, as `fdistill.data` opens them; they are prepared as the protocol prepares its reference.
        output: an .npz file.
        protocol: a key of `evaluation.protocols.PROTOCOLS`.
        metrics: what it is to serve: moments for distances such as fid, and single images' rows, which are large, for
            metrics such as recall. By default the protocol's own metrics that moments are enough for.
        weights, batch_size, device: as in `evaluate`.

    Raises:
        ArgumentError, CheckpointError, DataError: images or weights that cannot be used, a metric that needs none.
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
    labels = {
        kind: dict.fromkeys(key.split(".")[0] for m in wanted if m.against == kind for key in m.features)
        for kind in ("moments", "rows")
    }
    every = dict.fromkeys([*labels["moments"], *labels["rows"]])
    if not every:
        raise ArgumentError(
            f"metrics: {', '.join(metrics or chosen.default)} need no reference; expected one that does"
        )
    recipes = {"": (chosen.reference_recipe, chosen.size), **chosen.views}
    views = open_views(data, recipes, channels=chosen.channels)
    extractors = {label: open_extractor(label.partition("@")[0], on, setting.weights) for label in every}
    count = len(views[""])
    for label in labels["moments"]:
        width = max(extractors[label].outputs.values())
        if count <= width:
            raise ArgumentError(
                f"data {data}: {count} images, and the covariance of {width} features needs more than {width}; pass "
                "more, or metrics that need single images alone, such as recall"
            )
    against = Against(str(data), views, None, False)
    some = {label: extractors[label] for label in labels["rows"]}
    rows = dict(against.rows(some, batch_size, on)) if some else {}  # of these alone: moments may read more of them
    moments = against.moments(extractors, batch_size, on)
    if rng.world()[0] == 0:
        images = views[""]
        write_reference(
            path,
            moments,
            rows=rows or None,
            protocol=chosen.name,
            extractors={label: {"sha256": e.sha256, "preparation": e.preparation} for label, e in extractors.items()},
            count=len(images),
            resolution=_side(images),
            source=images.name,
            source_sha256=images.sha256(),
        )
    return path


def _side(images: Images) -> int | None:
    """Of square images; None of others."""
    width, _, height = str(images.facts["resolution"]).partition("x")
    return int(width) if width == height else None
