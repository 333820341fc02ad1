"""UNet2DModel teachers against diffusers: pixels, the network, and its scheduler's way from output to x0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from fdistill.adapters.checkpoint import load_teacher
from fdistill.base.images import to_uint8, to_unit
from support import families
from support.tolerances import assert_rounded

FOLDERS: dict[str, Callable[[Path], Path]] = {
    "eps": families.ddpm,
    "v": families.ddpm_v,
    "x0": families.ddpm_x0,
    "learned-variance": families.learned_variance,
    "classes": families.class_conditional,
    "consistency": families.consistency,
    "edm": families.edm_scheduler,
    "flow": families.flow,
}
LABELS = torch.tensor([3, 7])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("unets")
    return {name: make(base / name) for name, make in FOLDERS.items()}


def component(folder: Path, name: str, config: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a component, which may be the checkpoint's own, and its config."""
    place = folder / name if (folder / name).is_dir() else folder
    return place, json.loads((place / config).read_text())


class Published:
    """The network and scheduler of a folder, as diffusers loads them."""

    def __init__(self, folder: Path):
        place, _ = component(folder, "unet", "config.json")
        self.unet: Any = UNet2DModel.from_pretrained(place).eval()
        place, config = component(folder, "scheduler", "scheduler_config.json")
        kind = getattr(diffusers, config["_class_name"])
        self.scheduler: Any = kind.from_pretrained(place, **({"clip_sample": False} if "clip_sample" in config else {}))

    def network(self, x: Tensor, timestep: Any) -> Tensor:
        labels = LABELS if self.unet.config.num_class_embeds else None
        with torch.no_grad():
            output: Tensor = self.unet(x, timestep, labels).sample
        return output

    def levels(self) -> list[float]:
        """Near the least noise, in the middle and at the end."""
        name = type(self.scheduler).__name__
        if name.startswith(("DDPM", "DDIM")):
            return [1.0, 500.0, 999.0]
        return [0.02, 0.5, 1.0] if name.startswith("Flow") else [0.002, 0.5, 80.0]

    def x0(self, x_t: Tensor, level: float) -> Tensor:
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        if name.startswith(("DDPM", "DDIM")):
            scheduler.set_timesteps(1000)
            found: Tensor = scheduler.step(self.network(x_t, int(level)), int(level), x_t).pred_original_sample
        elif name.startswith("Flow"):
            scheduler.set_timesteps(sigmas=np.array([level]))
            timestep = scheduler.timesteps[0]
            found = scheduler.step(self.network(x_t, timestep), timestep, x_t).prev_sample
        elif name.startswith("EDM"):
            sigma = torch.tensor(level)
            output = self.network(scheduler.precondition_inputs(x_t, sigma), scheduler.precondition_noise(sigma))
            found = scheduler.precondition_outputs(x_t, output, sigma)
        else:
            sigma = torch.tensor(level)
            scaled = x_t / (sigma**2 + scheduler.config.sigma_data**2) ** 0.5
            output = self.network(scaled, torch.from_numpy(scheduler.sigma_to_t(np.array([level]))).float())
            skip, out = scheduler.get_scalings_for_boundary_condition(sigma)
            found = skip * x_t + out * output
        return found


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("name", FOLDERS)
def test_x0_is_diffusers(name: str, place: int, folders: dict[str, Path]) -> None:
    published, teacher = Published(folders[name]), load_teacher(folders[name])
    level = published.levels()[place]
    t = torch.full((2,), level)
    scale = float(teacher.schedule.sigma(t)[0])
    noise = torch.randn(2, 2, *teacher.sample_shape, generator=torch.Generator().manual_seed(place))
    x_t = teacher.schedule.alpha(t)[0] * noise[0].clamp(-1, 1) + scale * noise[1]
    with torch.no_grad():
        found = teacher(x_t, t, LABELS if teacher.num_classes else None)
    expected = published.x0(x_t, level)
    assert expected.std() > 0.05
    assert_rounded(found, expected)


def test_pixels_are_those_of_the_pipelines() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    processor: Any = VaeImageProcessor
    assert_rounded(to_unit(images), processor.normalize(images.float() / 255))
    shown = processor.numpy_to_pil(processor.pt_to_numpy(processor.denormalize(to_unit(images))))
    assert np.array_equal(np.array(shown[0]), to_uint8(to_unit(images))[0, 0].numpy())
