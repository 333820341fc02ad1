"""Guidance away from no condition (arXiv 2207.12598), for class labels and prompts, or from a second network."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition, TextCondition, concat, none_like
from fdistill.denoiser import Denoiser, Features
from fdistill.prediction import Preconditioning, Prediction


class GuidedDenoiser(Denoiser):
    """x0 = unconditional + guidance_scale (conditional - unconditional), from one evaluation of a batch twice as large,
    or from two if only features need a gradient. Features are those with the condition. Channels behind the denoiser's
    `guidance_channels` stay conditional.

    With a `guide` it is x0 = guide + guidance_scale (denoiser - guide), where both have the condition, but a guide
    that takes none: a weaker network is autoguidance (arXiv 2406.02507), one without classes guides as EDM2 does.

    Args:
        denoiser: conditioned on class labels, with a `null_class`, or on prompts.
        guidance_scale: 1 gives the conditional output.
        null: one prompt, usually the empty or negative prompt, that guidance leads away from, on the device of the
            inputs; needed if the denoiser is conditioned on prompts.
        rescale: in [0, 1]: how far the guided output's norm (`Denoiser.guidance_norm`) is brought back to that of the
            conditional output. This keeps large scales from saturating colours (Lin et al. 2023, arXiv 2305.08891,
            section 3.4).
        guide: a second network, whose input and output mean the same as the denoiser's. `null` is not used then.

    Raises:
        ArgumentError: without a guide, the denoiser has no label for "no class", or takes prompts and `null` is not one
            prompt.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guidance_scale: float,
        *,
        null: TextCondition | None = None,
        rescale: float = 0.0,
        guide: Denoiser | None = None,
    ):
        super().__init__()
        if guide is not None:
            pass
        elif denoiser.text_shapes is not None:
            if null is None or len(null) != 1:
                raise ArgumentError("null: expected one prompt, such as the empty one, as a TextCondition")
            for name, value in null.tensors.items():
                self.register_buffer(f"null_{name}", value, persistent=False)
        elif denoiser.num_classes is None or denoiser.null_class is None:
            known = "no classes" if denoiser.num_classes is None else "no label for `no class`"
            raise ArgumentError(
                f"guidance_scale: got {guidance_scale:g}, but the teacher has {known}; expected 1, null_class set to "
                "the teacher's label for it, or a second network as guidance_teacher"
            )
        self.denoiser = denoiser
        self.guide = guide
        self.guidance_scale = guidance_scale
        self.rescale = rescale
        self.schedule = denoiser.schedule
        self.sample_shape = denoiser.sample_shape
        self.num_classes = denoiser.num_classes
        self.null_class = denoiser.null_class
        self.text_shapes = denoiser.text_shapes
        self.sigma_data = denoiser.sigma_data
        self.feature_shapes = denoiser.feature_shapes
        self.latent_scaling = denoiser.latent_scaling
        self.kind = denoiser.kind if denoiser.kind is not None else id(denoiser)

    @property
    def null(self) -> TextCondition | int:
        """What guidance leads away from: one prompt, or the label for `no class`."""
        if self.text_shapes is None:
            assert self.null_class is not None
            return self.null_class
        return TextCondition({name: self.get_buffer(f"null_{name}") for name in self.text_shapes})

    def resize(self, height: int, width: int) -> None:
        for network in (self.denoiser, self.guide):
            if network is not None:
                network.resize(height, width)
        self.sample_shape, self.feature_shapes = self.denoiser.sample_shape, self.denoiser.feature_shapes

    def preconditioning(self, t: Tensor) -> Preconditioning:
        return self.denoiser.preconditioning(t)

    def run(
        self,
        network_input: Tensor,
        t: Tensor,
        condition: Condition | None,
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
        condition: Condition | None,
        features: Sequence[str] = (),
        *,
        form: Preconditioning | None = None,
        output_grad: bool = True,
    ) -> tuple[Prediction, Features]:
        if condition is None and self.guide is None:
            wanted = "prompts" if self.text_shapes is not None else f"class labels [B] in [0, {self.num_classes})"
            raise ArgumentError(f"condition: got None; a guided network takes {wanted}")
        self._check_features(features)
        conditional, unconditional, tapped = self._outputs(network_input, t, condition, features, output_grad)
        guided_channels = self.denoiser.guidance_channels
        if guided_channels is not None:
            unconditional = torch.cat([unconditional[:, :guided_channels], conditional[:, guided_channels:]], dim=1)
        form = self.preconditioning(t) if form is None else form
        prediction = Prediction(conditional, form.skip, form.out, unconditional, self.guidance_scale)
        if self.rescale:
            guided = prediction.guided().output
            back = self.denoiser.guidance_norm(conditional) / self.denoiser.guidance_norm(guided)
            prediction = Prediction(guided * torch.lerp(torch.ones_like(back), back, self.rescale), form.skip, form.out)
        return prediction, tapped

    def _outputs(
        self, network_input: Tensor, t: Tensor, condition: Condition | None, features: Sequence[str], output_grad: bool
    ) -> tuple[Tensor, Tensor, Features]:
        """The output, the one that guidance leads away from, and the features of the former.

        Where features alone need a gradient the two are evaluated apart, so that nothing of the second is kept for it.
        """
        if self.guide is not None:
            own = None if self.guide.num_classes is None and self.guide.text_shapes is None else condition
            return self._apart(self.guide, own, network_input, t, condition, features, output_grad)
        assert condition is not None
        none = none_like(condition, self.null)
        needed = network_input.requires_grad or any(each.requires_grad for each in self.parameters())
        if features and not output_grad and needed and torch.is_grad_enabled():
            return self._apart(self, none, network_input, t, condition, features, output_grad)
        both, tapped = self.run(
            torch.cat([network_input, network_input]),
            torch.cat([t, t]),
            concat(condition, none),
            features,
            output=True,
            output_grad=output_grad,
        )
        assert both is not None
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional, {name: value[: len(t)] for name, value in tapped.items()}

    def _apart(
        self,
        other: Denoiser,
        other_condition: Condition | None,
        network_input: Tensor,
        t: Tensor,
        condition: Condition | None,
        features: Sequence[str],
        output_grad: bool,
    ) -> tuple[Tensor, Tensor, Features]:
        """As `_outputs`, from an evaluation of this network and one of the other."""
        first, tapped = self.run(network_input, t, condition, features, output=True, output_grad=output_grad)
        with nullcontext() if output_grad else torch.no_grad():
            second, _ = other.run(network_input, t, other_condition, (), output=True, output_grad=output_grad)
        assert first is not None
        assert second is not None
        return first, second, tapped
