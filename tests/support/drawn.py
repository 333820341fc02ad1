"""What a run's student draws for its grid of samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fdistill.training import sample_grids


class Drawn:
    """What a run's student drew last, and of what: noise, prompts, images in [0, 1]."""

    def __init__(self) -> None:
        self.noise = self.images = torch.empty(0)
        self.prompts: list[str] = []
        self.trained: dict[str, int] = {}
        self.weights: dict[str, set[int]] = {}

    def record(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decode, inputs = sample_grids._images, sample_grids._grid_inputs

        def grid_inputs(run: Any) -> Any:
            noise, condition = inputs(run)
            self.noise, self.prompts = noise, sample_grids.grid_prompts(run)
            roles = {"teacher": run.networks.teacher, "fake": run.networks.fake_score, "student": run.student}
            self.weights = {role: {p.data_ptr() for p in module.parameters()} for role, module in roles.items()}
            return noise, condition

        def images(run: Any, x0: Tensor) -> Tensor:
            self.images = (run.latents.decode(x0) / 2 + 0.5).clamp(0, 1)
            return decode(run, x0)

        monkeypatch.setattr(sample_grids, "_grid_inputs", grid_inputs)
        monkeypatch.setattr(sample_grids, "_images", images)
