"""Classifier-free guidance of a class-conditional teacher (arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdistill.denoiser import Denoiser, Features, Preconditioning, Prediction
from fdistill.errors import ArgumentError


class GuidedDenoiser(Denoiser):
    """x0 = unconditional + guidance_scale (conditional - unconditional), from one evaluation of a batch twice as large.
    Features are those of the conditional half.

    Args:
        denoiser: class-conditional, with a `null_class`.
        guidance_scale: 1 is the denoiser itself.

    Raises:
        ArgumentError: the denoiser has no label for "no class".
    """

    def __init__(self, denoiser: Denoiser, guidance_scale: float):
        super().__init__()
        if denoiser.num_classes is None or denoiser.null_class is None:
            known = "no classes" if denoiser.num_classes is None else "no label for `no class`"
            raise ArgumentError(
                f"guidance_scale: got {guidance_scale:g}, but the teacher knows {known}; expected 1, or null_class set "
                "to the teacher's label for it"
            )
        self.denoiser = denoiser
        self.guidance_scale = guidance_scale
        self.schedule = denoiser.schedule
        self.sample_shape = denoiser.sample_shape
        self.num_classes = denoiser.num_classes
        self.null_class: int = denoiser.null_class
        self.sigma_data = denoiser.sigma_data
        self.feature_shapes = denoiser.feature_shapes
        self.latent_scaling = denoiser.latent_scaling
        self.kind = denoiser.kind if denoiser.kind is not None else id(denoiser)

    def preconditioning(self, t: Tensor) -> Preconditioning:
        return self.denoiser.preconditioning(t)

    def run(
        self,
        network_input: Tensor,
        t: Tensor,
        condition: Tensor | None,
        features: Sequence[str],
        *,
        output: bool,
        output_grad: bool,
    ) -> tuple[Tensor | None, Features]:
        return self.denoiser.run(network_input, t, condition, features, output=output, output_grad=output_grad)

    def predict(
        self,
        network_input: Tensor,
        t: Tensor,
        condition: Tensor | None,
        features: Sequence[str] = (),
        *,
        form: Preconditioning | None = None,
        output_grad: bool = True,
    ) -> tuple[Prediction, Features]:
        if condition is None:
            raise ArgumentError(f"condition: a guided network wants class labels [B] in [0, {self.num_classes})")
        self._check_features(features)
        both, tapped = self.run(
            torch.cat([network_input, network_input]),
            torch.cat([t, t]),
            torch.cat([condition, torch.full_like(condition, self.null_class)]),
            features,
            output=True,
            output_grad=output_grad,
        )
        assert both is not None
        conditional, unconditional = both.chunk(2)
        form = self.preconditioning(t) if form is None else form
        prediction = Prediction(conditional, form.skip, form.out, unconditional, self.guidance_scale)
        return prediction, {name: value[: len(t)] for name, value in tapped.items()}
