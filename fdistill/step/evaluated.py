"""Teacher and fake score evaluated at the same noised student samples, as the student's updates compare them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdistill.condition import Condition
from fdistill.prediction import Prediction
from fdistill.step.roles import Networks, frozen, renoise


class Evaluated(NamedTuple):
    """Noised samples x_t [B, C, H, W], what each network predicts for them, and the discriminator's logits [B, H]."""

    x_t: Tensor
    teacher: Prediction
    fake: Prediction
    logits: Tensor | None


def log_ratio(logits: Tensor) -> Tensor:
    """log(p_teacher / p_student) [B] for the logs, as the mean of the heads' logits [B, H] or [B], before bounds and
    bins.
    """
    return logits.detach().float().reshape(len(logits), -1).mean(1)


def evaluate(
    networks: Networks,
    x0: Tensor,
    t: Tensor,
    condition: Condition | None,
    generator: torch.Generator,
    *,
    read_logits: bool,
    output_grad: bool,
    backend: str = "auto",
) -> Evaluated:
    """Noises x0 [B, C, H, W] to levels t [B] and evaluates teacher, fake score and discriminator, all of them frozen.

    Args:
        read_logits: whether the discriminator is evaluated; otherwise `logits` is None.
        output_grad: whether gradients flow from the predictions to x0. Without it, only the logits have gradients, and
            a network without tapped features keeps no activations.
    """
    pair = networks.pair
    predictions, features = [], {}
    with frozen(networks.teacher, networks.fake_score, networks.discriminator):
        x_t, inputs, forms = renoise(pair, x0, t, generator, backend=backend)
        for network, network_input, form in zip(pair, inputs, forms, strict=True):
            taps = networks.taps(network) if read_logits else ()
            seen = network_input if output_grad or taps else network_input.detach()
            prediction, tapped = network.predict(seen, t, condition, taps, form=form, output_grad=output_grad)
            predictions.append(prediction)
            features.update(tapped)
        logits = networks.tapped_discriminator()[0](features) if read_logits else None
    return Evaluated(x_t, predictions[0], predictions[1], logits)
