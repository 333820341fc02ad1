"""What every protocol fixes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from evaluation.metrics.metric import Metric


@dataclass(frozen=True)
class Protocol:
    """Everything that two people must agree on to get the same scores of the same model.

    Attributes:
        metrics: all metrics that can be measured.
        default: names of those that are measured if the user names none.
        num_samples: number of samples; scores of another number say so in their names. None if any number will do.
        reference: in words, what samples are compared with.
        channels: 3, or 1 for greyscale.
        size: height and width of prepared images in pixels; None if any size will do, the same for all images.
        recipe: how samples are prepared, a key of `evaluation.recipes.RECIPES`.
        reference_recipe: how images of a reference are prepared.
        views: further preparations of the same images, {name: (recipe, size)}. Features of "inception-clean@patch" are
            those of extractor "inception-clean" in view "patch".
        embedded: data set that serves as reference if the user gives none; None if the user must give one.
        reference_files: file names of published statistics of the reference. Statistics under other names show in the
            names of scores, as a file does not say which images it is of.
        reference_count: number of images in the reference.
        prompts: returns the prompt of each sample; None for a protocol of classes, or of prompts that the user gives.
        num_classes: number of classes; None for a protocol without classes.
        random_labels: whether the class of sample i is drawn at random from (seed, i); else classes are in turn.
        asks_prompts: whether the user must give a list of prompts, one for each sample.
        facts: what else is needed to repeat the measurement, for the provenance of scores.
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

    def sample_views(self) -> dict[str, tuple[str, int | None]]:
        """(recipe, size) of samples in every view, "" being the protocol's own."""
        return {"": (self.recipe, self.size), **self.views}

    def reference_views(self) -> dict[str, tuple[str, int | None]]:
        """(recipe, size) of images of a reference in every view."""
        return {"": (self.reference_recipe, self.size), **self.views}

    def names(self) -> dict[str, Metric]:
        """{name: metric} for every name that --metrics takes: of metrics, and of the single numbers that they give."""
        return {name: metric for metric in self.metrics for name in (metric.name, *metric.outputs)}
