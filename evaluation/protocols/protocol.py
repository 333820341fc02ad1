"""What every protocol says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from evaluation.metric import Metric


@dataclass(frozen=True)
class Protocol:
    """A way to measure that two people would repeat alike.

    Attributes:
        metrics: what it can measure.
        default: names of what it measures unless told otherwise.
        num_samples: the full sample count; scores of any other count carry it in their name. None for any.
        channels: 3, or 1 for greyscale.
        size: height and width of prepared images; None for any, if all are alike.
        recipe: how samples are prepared, a key of `evaluation.recipes.RECIPES`.
        reference_recipe: how images that are given as reference are prepared.
        views: other preparations of the same images that some extractors look at, (recipe, size) by name: features of
            "inception-clean@patch" are of the view "patch".
        reference: in words, what it measures against.
        embedded: name of the data set it measures against where none is given; None if one must be given.
        reference_files: names of published statistics files that are that reference; others show in a score's name, as
            nothing in a file tells of which images it is.
        reference_count: how many images it has, where images are given.
        prompts: what each sample is asked to be; None for classes, or prompts that must be given.
        num_classes: how many classes there are samples of; None where there are none.
        random_labels: whether classes are drawn evenly at random, as (seed, i) has it, and not in turn.
        asks_prompts: whether a list of prompts must be given.
        facts: what else one has to know to repeat it, for provenance.
    """

    name: str
    metrics: tuple[Metric, ...]
    default: tuple[str, ...]
    num_samples: int | None
    reference: str
    channels: int = 3
    size: int | None = None
    recipe: str = "exact"
    reference_recipe: str = "exact"
    views: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    embedded: str | None = None
    reference_files: tuple[str, ...] = ()
    reference_count: int | None = None
    prompts: Callable[[], list[str]] | None = None
    num_classes: int | None = None
    random_labels: bool = False
    asks_prompts: bool = False
    facts: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> dict[str, Metric]:
        """What --metrics may name: metrics, and single numbers of those that give several."""
        return {name: metric for metric in self.metrics for name in (metric.name, *metric.outputs)}
