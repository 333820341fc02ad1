"""Memory of one real iteration of every recipe at its peak, from updates on fake tensors, as Markdown.

python scripts/activations_table.py [RECIPE ...] [--out FILE]

Networks of the published sizes take part as `fdistill plan` builds and counts them, with the recipe's own config. A
critic's and a student's update run forward and backward as in training, and whatever tensor is made is counted from its
first use to its last. What is not seen: workspaces of convolutions, and what the allocator keeps in reserve.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memory_table
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

from fdistill.adapters import wrap
from fdistill.adapters.checkpoint import Checkpoint
from fdistill.base.files import atomic_file
from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.denoiser import Denoiser
from fdistill.networks import EDM2Network, EDMNetwork
from fdistill.planning.counting import CRITIC, STUDENT
from fdistill.planning.fake_tensors import fake
from fdistill.planning.placement import footprint, on_a_device, placement_of
from fdistill.planning.weightless import run_without_weights
from fdistill.teachers.teacher import Teacher
from fdistill.training.distillation import Distillation


def _edm_cifar10(classes: int) -> Callable[[], Any]:
    def made() -> Any:
        return EDMNetwork(
            model_type="SongUNet",
            img_resolution=32,
            label_dim=classes,
            augment_dim=9,
            model_channels=128,
            channel_mult=[2, 2, 2],
            num_blocks=4,
            attn_resolutions=[16],
        )

    return made


def _adm_imagenet64() -> Any:
    return EDMNetwork(
        model_type="DhariwalUNet",
        img_resolution=64,
        label_dim=1000,
        model_channels=192,
        channel_mult=[1, 2, 3, 4],
        num_blocks=3,
        attn_resolutions=[32, 16, 8],
    )


def _edm2_s() -> Any:
    return EDM2Network(
        img_resolution=64,
        img_channels=4,
        label_dim=1000,
        latent_scale=[0.1] * 4,
        latent_bias=[0.0] * 4,
    )


def _ddpm_cifar10() -> Any:
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
    )


def _dit_xl_2() -> Any:
    return DiTTransformer2DModel(in_channels=4, out_channels=8, num_layers=28)


def _sd21() -> Any:
    return UNet2DConditionModel(
        sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    )


_SD21 = {**memory_table._BETAS, "prediction_type": "v_prediction"}
#: Recipe -> (its network, the scheduler beside it or None, its size in millions, without what is cut off on loading).
NETWORKS: dict[str, tuple[Callable[[], Any], dict[str, Any] | None, float]] = {
    "cifar10-cond": (_edm_cifar10(10), None, 55.7),
    "cifar10-uncond": (_edm_cifar10(0), None, 55.7),
    "ddpm-cifar10": (_ddpm_cifar10, memory_table._LINEAR, 35.7),
    "imagenet64": (_adm_imagenet64, None, 295.9),
    "imagenet256": (_dit_xl_2, memory_table._LINEAR, 749.8),
    "imagenet512": (_edm2_s, None, 280.2),
    "sd21-v": (_sd21, _SD21, 865.9),
    **{f"{name}-lora-24gb": memory_table.NETWORKS[name] for name in ("sd15", "sdxl", "sd35-medium", "flux-dev")},
    "flux2-klein-lora-24gb": memory_table.ADAPTED["flux2-klein"],
    **memory_table.NETWORKS,
}


def _alone(recipe: str) -> bool:
    """Whether a recipe is for one GPU; all others are for eight."""
    return recipe == "ddpm-cifar10" or recipe.endswith("-24gb")


def published(recipe: str, config: DistillConfig) -> Denoiser:
    """The recipe's teacher on fake tensors, frozen, float32, for the recipe's resolution.

    Raises:
        ValueError: it has another number of parameters than was published.
    """
    make, scheduler, millions = NETWORKS[recipe][:3]
    with fake():
        network = make().eval()
    denoiser = wrap(network, scheduler).requires_grad_(False)
    if config.resolution is not None:
        denoiser.resize(*2 * (config.resolution // memory_table.pixels_per_latent(denoiser),))
    size = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    if abs(size - millions) > 0.2:
        raise ValueError(f"{recipe}: {size:.1f} M parameters, published with {millions} M")
    return denoiser


def built(recipe: str, config: DistillConfig) -> Distillation:
    """The run that the recipe describes, on fake tensors."""
    return run_without_weights(config, Teacher(Checkpoint(recipe), published(recipe, config), None))


@dataclass(frozen=True)
class Peak:
    """Bytes on one GPU.

    Attributes:
        batch: samples on this GPU.
        held: weights, optimiser and averages, all the time.
        critic, student: the most that an update has on top: activations, what is made in between, and gradients.
    """

    recipe: str
    batch: int
    held: int
    critic: int
    student: int

    @property
    def total(self) -> int:
        return self.held + max(self.critic, self.student)


def peak(recipe: str, **changes: Any) -> Peak:
    """One update of the critic and one of the student, as in training; `changes` are settings of the config."""
    config = load_config(recipe, changes)
    gpus = 1 if _alone(recipe) else 8
    device = on_a_device(footprint(built(recipe, config), gpus), placement_of(config, 1, gpus))
    critic, student = (device.gradients[name] + device.activations[name] for name in (CRITIC, STUDENT))
    return Peak(recipe, config.batch_size // gpus, device.held, critic, student)


def table(recipes: Iterable[str] = NETWORKS) -> str:
    """A line for each recipe, in GB (1e9 bytes)."""
    lines = [
        "| recipe | samples per GPU | weights, AdamW, EMA | critic's update | student's update | peak, GB |",
        "|---|---|---|---|---|---|",
    ]
    for recipe in recipes:
        found = peak(recipe)
        parts = (found.held, found.critic, found.student, found.total)
        lines.append(f"| {recipe} | {found.batch} | " + " | ".join(f"{part / 1e9:.1f}" for part in parts) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="all by default")
    parser.add_argument("--out", type=Path, help="a file for the table")
    arguments = parser.parse_args()
    text = table(arguments.recipes or sorted(NETWORKS)) + "\n"
    if arguments.out is not None:
        with atomic_file(arguments.out) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
