"""A preference model's score of the student's images for their prompts, as a loss."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from fdistill.base.errors import CheckpointError
from fdistill.base.reading import not_here
from fdistill.config.terms import RewardConfig
from fdistill.preference.models import MODELS, PreferenceModel
from fdistill.teachers.autoencoder import LatentSpace, unit_images


class RewardLoss(nn.Module):
    """Minus the score that a preference model gives an image for its prompt.

    Args:
        model: frozen.
        latents: the autoencoder that decodes samples; None if samples are images.
    """

    def __init__(self, model: PreferenceModel, latents: LatentSpace | None = None):
        super().__init__()
        self.model = model
        self._latents = latents

    def forward(self, x0: Tensor, text: Tensor) -> Tensor:
        """[B] losses of samples [B, C, H, W] and unit features [B, D] of their prompts, differentiable in x0."""
        return -self.model.score(unit_images(x0, self._latents), text)


def load_preference_model(reward: RewardConfig) -> PreferenceModel:
    """The section's model on the CPU.

    Raises:
        CheckpointError: no such file, or one that has not that model's weights.
    """
    published, path = MODELS[reward.model], Path(str(reward.weights)).expanduser()
    take = f"take {published.file} of https://huggingface.co/{published.repository} and pass its path"
    if not path.is_file():
        raise CheckpointError(f"reward.weights {str(path)!r}: {not_here(path)}; {take}")
    try:
        return published.load(path)
    except CheckpointError as error:
        raise CheckpointError(f"reward.model={reward.model}: {error}; {take}") from error
