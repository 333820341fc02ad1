"""The one view every network is seen through: (x_t, t, condition) -> x0, and intermediate features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from fdistill.errors import ArgumentError, did_you_mean
from fdistill.noise import NoiseSchedule

Features = dict[str, Tensor]


class Denoiser(nn.Module, ABC):
    """An x0-predicting network at levels t of its own noise schedule.

    Attributes:
        schedule: x_t = schedule.alpha(t) x0 + schedule.sigma(t) eps.
        sample_shape: (C, H, W) of one x0; values nominally in [-1, 1].
        num_classes: conditions are labels [B] in [0, num_classes); None for an unconditional network.
        sigma_data: standard deviation of the data, used by the EDM loss weighting.
        feature_shapes: (C, H, W) of every tensor that `features` can name, from the input towards the output.
    """

    schedule: NoiseSchedule
    sample_shape: tuple[int, int, int]
    num_classes: int | None
    sigma_data: float
    feature_shapes: dict[str, tuple[int, int, int]]

    @abstractmethod
    def run(
        self, x_t: Tensor, t: Tensor, condition: Tensor | None, features: Sequence[str], *, x0: bool, x0_grad: bool
    ) -> tuple[Tensor | None, Features]:
        """What adapters implement: the x0-prediction in float32 (None unless `x0`) and the named features.

        With `x0_grad` False the part of the network that only x0 depends on runs without autograd and keeps no
        activations.
        """

    def denoise(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        features: Sequence[str] = (),
        *,
        x0_grad: bool = True,
    ) -> Tensor | tuple[Tensor, Features]:
        """x0-prediction, differentiable in x_t.

        Args:
            x_t: [B, C, H, W], noisy samples at levels t.
            t: [B] levels of `schedule`.
            condition: [B] class labels, or None for an unconditional network.
            features: names out of `feature_shapes`.
            x0_grad: False where only the features need a gradient.

        Returns:
            x0 [B, C, H, W] float32; with features, (x0, {name: [B, *feature_shapes[name]]}).
        """
        x0, tapped = self.denoise_with_features(x_t, t, condition, features, x0_grad=x0_grad)
        return (x0, tapped) if features else x0

    forward = denoise

    def denoise_with_features(
        self, x_t: Tensor, t: Tensor, condition: Tensor | None, features: Sequence[str], *, x0_grad: bool = True
    ) -> tuple[Tensor, Features]:
        """`denoise` that returns the pair even when no feature is asked for."""
        self._check_features(features)
        x0, tapped = self.run(x_t, t, condition, features, x0=True, x0_grad=x0_grad)
        assert x0 is not None
        return x0, tapped

    def features(self, x_t: Tensor, t: Tensor, condition: Tensor | None, features: Sequence[str]) -> Features:
        """The named features alone; what lies beyond the last of them is not computed."""
        self._check_features(features)
        return self.run(x_t, t, condition, features, x0=False, x0_grad=False)[1]

    def _check_features(self, features: Sequence[str]) -> None:
        for name in features:
            if name not in self.feature_shapes:
                raise ArgumentError(f"features: got {name!r}; {did_you_mean(name, self.feature_shapes)}")
