"""The interface that all networks share: (x_t, t, condition) -> x0, and intermediate features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fdistill.base.errors import ArgumentError, did_you_mean
from fdistill.condition import Condition, TextCondition
from fdistill.kernels.layout import expand
from fdistill.noise import NoiseSchedule
from fdistill.prediction import Preconditioning, Prediction

__all__ = ["Denoiser", "Features", "LatentScaling"]

Features = dict[str, Tensor]


class LatentScaling(NamedTuple):
    """How an autoencoder's latents z become samples: sample = scale * z + bias, channel by channel.

    Attributes:
        pixel_range: the values of black and white in the images that the autoencoder reads and writes. It is [-1, 1]
            almost everywhere, and [0, 1] for EDM2's networks (NVlabs/edm2, `StabilityVAEEncoder`).
    """

    scale: tuple[float, ...]
    bias: tuple[float, ...]
    pixel_range: tuple[float, float] = (-1.0, 1.0)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> LatentScaling:
        """From what `settings` returned; those of before it named a pixel range mean [-1, 1]."""
        low, high = settings.get("pixel_range") or (-1.0, 1.0)
        return cls(tuple(settings["latent_scale"]), tuple(settings["latent_bias"]), (low, high))

    def settings(self) -> dict[str, list[float]]:
        """The JSON values that are stored with students and beside cached latents."""
        return {
            "latent_scale": list(self.scale),
            "latent_bias": list(self.bias),
            "pixel_range": list(self.pixel_range),
        }

    def to_samples(self, z: Tensor) -> Tensor:
        """Converts latents [B, C, h, w] to the samples that the denoiser takes."""
        return _by_channel(self.scale, z) * z + _by_channel(self.bias, z)

    def to_latents(self, samples: Tensor) -> Tensor:
        """The inverse of `to_samples`."""
        return (samples - _by_channel(self.bias, samples)) / _by_channel(self.scale, samples)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] -> the pixel values that the autoencoder reads."""
        low, high = self.pixel_range
        return images if (low, high) == (-1, 1) else low + (images + 1) * ((high - low) / 2)

    def to_images(self, pixels: Tensor) -> Tensor:
        """The inverse of `to_pixels`."""
        low, high = self.pixel_range
        return pixels if (low, high) == (-1, 1) else (pixels - low) * (2 / (high - low)) - 1


def _by_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """C numbers -> [1, C, 1, 1] on the device and in the dtype of `like`."""
    return torch.tensor(values, device=like.device, dtype=like.dtype).reshape(1, -1, 1, 1)


class Denoiser(nn.Module, ABC):
    """A network that predicts x0 from noised samples at levels t of its own noise schedule.

    Attributes:
        schedule: x_t = schedule.alpha(t) x0 + schedule.sigma(t) eps.
        sample_shape: (C, H, W) of one x0; values nominally in [-1, 1].
        num_classes: conditions are labels [B] in [0, num_classes); None for a network that takes no labels.
        text_shapes: for a network conditioned on prompts, the shape of each tensor of a `TextCondition`, per prompt;
            None for a network that takes no prompts.
        null_class: the label that means "no class"; None if the network has no such label.
        sigma_data: standard deviation of the data, used by the EDM loss weighting.
        loss_weighting: the name of the weight in `losses.denoising_weight` with which such networks are trained.
        feature_shapes: (C, H, W) of every tensor that `features` can name, from the input towards the output.
        kind: networks of equal kind have the same preconditioning, which is computed once for all of them; None if no
            other network shares it.
        latent_scaling: how an autoencoder's latents become samples; None for a network that works on pixels.
        guidance_channels: how many of the first channels classifier-free guidance acts on, where the network's
            publisher guides only some of them; None: all.
        embedded_guidance: the guidance scale given to a guidance-distilled network, which takes it as an input; None
            for all other networks, which `GuidedDenoiser` guides.
        guidance_scale: the scale of a `GuidedDenoiser`; 1 for all other denoisers.
        network: the network of diffusers, or of fdistill, that the denoiser evaluates; None if it evaluates something
            else, such as another denoiser.
        parametrisation: a `fdistill.adapters.parametrisation.Parametrisation`, the meaning of the network's inputs and
            outputs; None if only `preconditioning` says it.
    """

    schedule: NoiseSchedule
    sample_shape: tuple[int, int, int]
    num_classes: int | None
    text_shapes: dict[str, tuple[int, ...]] | None = None
    sigma_data: float
    loss_weighting: str = "edm"
    feature_shapes: dict[str, tuple[int, int, int]]
    kind: object = None
    null_class: int | None = None
    latent_scaling: LatentScaling | None = None
    guidance_channels: int | None = None
    embedded_guidance: float | None = None
    guidance_scale: float = 1.0
    network: Any
    parametrisation: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.network = None  # an attribute of the class would hide the submodule of that name

    @abstractmethod
    def run(
        self,
        network_input: Tensor,
        t: Tensor,
        condition: Any,
        features: Sequence[str],
        *,
        output: bool,
        output_grad: bool,
    ) -> tuple[Tensor | None, Features]:
        """Returns the network's output (None unless `output`) and the named features. Adapters implement this.

        A condition is labels [B], a `TextCondition` of B prompts, or None, whichever the network takes.

        If `output_grad` is False, the part of the network that only the output depends on runs without autograd and
        keeps no activations.
        """

    def with_network(self, network: Any) -> Denoiser:
        """A denoiser of another network of this class, as for a smaller student; raises ArgumentError by default."""
        raise ArgumentError(f"network: a {type(self).__name__} takes no other network; it has no with_network")

    def resize(self, height: int, width: int) -> None:
        """Sets the height and width of samples; by default raises ArgumentError for any but the present ones."""
        if (height, width) != self.sample_shape[1:]:
            raise ArgumentError(
                f"size: got {height} x {width}, but a {type(self).__name__} has one size; expected "
                f"{self.sample_shape[1]} x {self.sample_shape[2]}"
            )

    def example_condition(self, count: int, device: torch.device | str) -> Condition | None:
        """A condition of the kind that this network takes: label 0, prompts that are all zeros, or None."""
        if self.text_shapes is not None:
            return TextCondition(
                {name: torch.zeros(count, *shape, device=device) for name, shape in self.text_shapes.items()}
            )
        return torch.zeros(count, dtype=torch.long, device=device) if self.num_classes else None

    def schedule_shift(self, steps: int) -> float | None:
        """The mu with which the network's pipeline makes its scheduler shift the sigmas of this many steps; None if mu
        follows from the scheduler's config.
        """
        return None

    def guidance_norm(self, output: Tensor) -> Tensor:
        """The norm by which `GuidedDenoiser` rescales, [B, 1, 1, 1] or finer: the standard deviation of each output."""
        return output.std(dim=(1, 2, 3), keepdim=True)

    def after_update(self) -> None:
        """Is called after every update of the parameters; networks that keep them normalised override it."""

    def preconditioning(self, t: Tensor) -> Preconditioning:
        """How `run`'s input and output relate to x_t and x0 at levels t [B]; by default they are x_t and x0."""
        return Preconditioning()

    def input_form(self) -> tuple[object, torch.dtype | None, bool]:
        """Kind, dtype (None means that of x_t) and whether channels are last, of this network's input. Denoisers with
        equal forms can share one input.
        """
        plain = type(self).preconditioning is Denoiser.preconditioning
        kind = id(self) if self.kind is None and not plain else self.kind
        # Of the first layer. Later ones may be adapters in float32, or have kernels that are stored in few bits.
        kernels = (value for value in self.parameters() if value.ndim == 4)  # usually the first of them is enough
        stem = next(kernels, None)
        if stem is None:
            return kind, None, False
        device = stem.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else stem.dtype
        for kernel in chain([stem], kernels):
            first, last = kernel.is_contiguous(), kernel.is_contiguous(memory_format=torch.channels_last)
            if first != last:  # a kernel of one channel or one pixel is contiguous in both formats
                return kind, dtype, last
        return kind, dtype, False

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's input for x_t at levels t."""
        return self._fed(x_t, self.preconditioning(t).input_scale)

    def _fed(self, x_t: Tensor, scale: Tensor | None) -> Tensor:
        _, dtype, last = self.input_form()
        fed = x_t if scale is None else expand(scale, x_t) * x_t
        return fed.to(dtype=dtype or fed.dtype, memory_format=torch.channels_last if last else torch.preserve_format)

    def predict(
        self,
        network_input: Tensor,
        t: Tensor,
        condition: Condition | None,
        features: Sequence[str] = (),
        *,
        form: Preconditioning | None = None,
        output_grad: bool = True,
    ) -> tuple[Prediction, Features]:
        """The network's raw output with the coefficients that turn it into x0, and the named features.

        Args:
            network_input: [B, C, H, W] from `network_input`, or from a kernel that made it together with x_t.
            form: the result of `preconditioning`, if the caller has it already.
            output_grad: False if only the features need a gradient.

        Other arguments are as in `denoise`.
        """
        self._check_features(features)
        output, tapped = self.run(network_input, t, condition, features, output=True, output_grad=output_grad)
        assert output is not None
        form = self.preconditioning(t) if form is None else form
        return Prediction(output, form.skip, form.out), tapped

    def denoise(
        self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()
    ) -> Tensor | tuple[Tensor, Features]:
        """Predicts x0, differentiably in x_t.

        Args:
            x_t: [B, C, H, W], noisy samples at levels t.
            t: [B] levels of `schedule`.
            condition: [B] class labels, a `TextCondition` of B prompts, or None for an unconditional network.
            features: names from `feature_shapes`.

        Returns:
            x0 [B, C, H, W] float32; if features are named, (x0, {name: [B, *feature_shapes[name]]}).
        """
        x0, tapped = self.denoise_with_features(x_t, t, condition, features)
        return (x0, tapped) if features else x0

    forward = denoise

    def denoise_with_features(
        self, x_t: Tensor, t: Tensor, condition: Condition | None, features: Sequence[str]
    ) -> tuple[Tensor, Features]:
        """Like `denoise`, but returns the pair (x0, features) even if no feature is named."""
        form = self.preconditioning(t)
        fed = self._fed(x_t, form.input_scale)
        prediction, tapped = self.predict(fed, t, condition, features, form=form)
        return prediction.x0(x_t), tapped

    def features(
        self, network_input: Tensor, t: Tensor, condition: Condition | None, features: Sequence[str]
    ) -> Features:
        """Only the named features; layers after the last of them do not run. Arguments are as in `predict`."""
        self._check_features(features)
        return self.run(network_input, t, condition, features, output=False, output_grad=False)[1]

    def _check_features(self, features: Sequence[str]) -> None:
        for name in features:
            if name not in self.feature_shapes:
                raise ArgumentError(f"features: got {name!r}; {did_you_mean(name, self.feature_shapes)}")
