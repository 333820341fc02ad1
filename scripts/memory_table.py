"""Bytes of weights, gradients, optimiser and averages in a distillation of text-to-image networks, as Markdown.

python scripts/memory_table.py [--out FILE]

The networks are built from their published settings on the meta device, so nothing is downloaded or allocated; one with
another number of parameters than was published is refused.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from fdistill.adapters import wrap
from fdistill.adapters.quantised_layers import KINDS as QUANTISED
from fdistill.adapters.quantised_layers import place
from fdistill.adapters.text_to_image import TextDenoiser
from fdistill.base.files import atomic_file
from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.config.sections import LoRAConfig
from fdistill.denoiser import Denoiser
from fdistill.discriminator import Discriminator
from fdistill.planning.fake_tensors import few_bits_by_size
from fdistill.planning.held import Row, frozen_row, nbytes, own_tensors, trained_row
from fdistill.students.lora import FAKE, STUDENT, lora_copy

RANK = 64
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
MODES = ("full", "LoRA")
_BETAS = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_LINEAR = {"_class_name": "DDIMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
_SANA = {
    "_class_name": "DPMSolverMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


def _sd15() -> Any:
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def _sdxl() -> Any:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _sd35_medium() -> Any:
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def _flux_dev() -> Any:
    return FluxTransformer2DModel(guidance_embeds=True)


def _pixart_sigma() -> Any:
    return PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        cross_attention_dim=1152,
        sample_size=128,
        caption_channels=4096,
        attention_bias=True,
        interpolation_scale=2,
        use_additional_conditions=False,
    )


def _z_image() -> Any:
    from diffusers import ZImageTransformer2DModel  # since 0.36

    return ZImageTransformer2DModel()


def _qwen_image() -> Any:
    from diffusers import QwenImageTransformer2DModel  # since 0.35

    return QwenImageTransformer2DModel()


def _sana() -> Any:
    return SanaTransformer2DModel(qk_norm="rms_norm_across_heads")


def _flux2_klein() -> Any:
    from diffusers import Flux2Transformer2DModel  # since 0.36

    return Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    )


#: Recipe -> (its network, the scheduler beside it, its published size in millions, positions of image patches apart).
NETWORKS: dict[str, tuple[Callable[[], Any], dict[str, Any], float]] = {
    "sd15": (_sd15, _BETAS, 859.5),
    "sdxl": (_sdxl, _BETAS, 2567.5),
    "sd35-medium": (_sd35_medium, _FLOW, 2243.2),
    "flux-dev": (_flux_dev, _FLOW, 11901.4),
    "pixart-sigma": (_pixart_sigma, _LINEAR, 610.9),
    "z-image": (_z_image, _FLOW, 6154.9),
    "qwen-image": (_qwen_image, _FLOW, 20430.4),
    "sana": (_sana, _SANA, 1604.6),
}
#: The same for networks that only a recipe of adapters is for; FLUX.2's publisher says 4 B.
ADAPTED: dict[str, tuple[Callable[[], Any], dict[str, Any], float]] = {"flux2-klein": (_flux2_klein, _FLOW, 3875.5)}


def published(network: str, resolution: int | None = None) -> TextDenoiser:
    """A published network on the meta device, frozen, float32, for latents of the resolution: its own, or in pixels."""
    build, scheduler, millions = (NETWORKS | ADAPTED)[network]
    with torch.device("meta"):
        built = build()
    size = sum(parameter.numel() for parameter in built.parameters()) / 1e6
    if abs(size - millions) > 0.1:
        raise ValueError(f"{network}: {size:.1f} M parameters, published with {millions} M; expected its own settings")
    denoiser = wrap(built, scheduler).requires_grad_(False)
    assert isinstance(denoiser, TextDenoiser)
    if resolution is not None:
        denoiser.resize(*2 * (resolution // pixels_per_latent(denoiser),))
    return denoiser


def pixels_per_latent(denoiser: Denoiser) -> int:
    """How many pixels a side of a published network's latents has: 8, 16 with FLUX.2's patches, 32 for Sana."""
    return {"Flux2Denoiser": 16, "SanaDenoiser": 32}.get(type(denoiser).__name__, 8)


def in_precision(denoiser: TextDenoiser, config: DistillConfig) -> TextDenoiser:
    """A network on the meta device in the config's `frozen_precision`, in place."""
    with few_bits_by_size():
        place(denoiser, config.frozen_precision, torch.device("meta"))
    return denoiser


def rows(network: str, config: DistillConfig) -> list[Row]:
    """Teacher, fake score, student and, if there is one, discriminator's heads of a distillation of one of NETWORKS."""

    def trained(section: LoRAConfig, role: str) -> tuple[TextDenoiser, nn.Module | None]:
        if not section.lora_rank:
            return published(network).requires_grad_(True), None
        copied = lora_copy(
            teacher,
            section.lora_rank,
            adapter=role,
            setting=role,
            alpha=section.lora_alpha,
            targets=section.lora_targets,
        )
        assert isinstance(copied, TextDenoiser)
        return copied, teacher

    teacher = in_precision(published(network, config.resolution), config)
    fake, shared_with_fake = trained(config.fake_score, FAKE)
    student, shared_with_student = trained(config.student, STUDENT)
    found = [
        frozen_row("teacher", teacher),
        trained_row("fake score", fake, shared_with_fake, optimizer=config.fake_score.optimizer),
        trained_row(
            "student", student, shared_with_student, len(config.ema.decays), optimizer=config.generator.optimizer
        ),
    ]
    if config.discriminator.gan_weight:
        with torch.device("meta"):
            heads = Discriminator(teacher, config.discriminator.features, config.discriminator.head)
        found.append(trained_row("heads", heads, optimizer=config.discriminator.optimizer))
    return found


@functools.cache  # both tables have LoRA on a base in bf16
def rows_in_mode(network: str, mode: str, frozen: str = "bf16") -> list[Row]:
    """The rows of a network's recipe in a mode."""
    return rows(network, in_mode(network, mode, frozen))


def in_mode(recipe: str, mode: str, frozen: str = "bf16") -> DistillConfig:
    """A recipe with all weights of student and fake score trained ("full"), or adapters of rank 64 ("LoRA")."""
    adapters = {"lora_rank": RANK, "lora_targets": TARGETS} if mode == "LoRA" else {"lora_rank": 0}
    settings = {f"{role}.{key}": value for role in ("student", "fake_score") for key, value in adapters.items()}
    return load_config(recipe, {**settings, "precision": "bf16", "frozen_precision": frozen})


def beyond_base(network: str, frozen: str) -> tuple[int, int]:
    """Bytes of both adapters with gradients, optimiser and averages, and of the base in a precision."""
    base, fake, student = rows_in_mode(network, "LoRA", frozen)[:3]
    return fake.total + student.total, base.total


def table(networks: Iterable[str] = NETWORKS) -> str:
    """Both modes of the networks, a line for each role, in GB (1e9 bytes)."""
    lines = [
        "| network | mode | role | trained, M | weights | gradients | AdamW | EMA | sum, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for network in networks:
        for mode in MODES:
            found = rows_in_mode(network, mode)
            for row in found:
                parts = (row.weights, row.gradients, row.optimizer, row.averages, row.total)
                numbers = " | ".join(f"{part / 1e9:.2f}" for part in parts)
                lines.append(f"| {network} | {mode} | {row.role} | {row.trained / 1e6:.1f} | {numbers} |")
            sums = [
                sum(getattr(row, part) for row in found) for part in ("weights", "gradients", "optimizer", "averages")
            ]
            numbers = " | ".join(f"{part / 1e9:.2f}" for part in (*sums, sum(sums)))
            trained = sum(row.trained for row in found) / 1e6
            lines.append(f"| {network} | {mode} | **all** | {trained:.1f} | {numbers} |")
    return "\n".join(lines)


def bound(networks: Iterable[str] = NETWORKS) -> str:
    """What LoRA mode holds beyond the base, heads apart, as a share of it."""
    lines = ["| network | base in | base, GB | adapters, GB | share |", "|---|---|---|---|---|"]
    for network in networks:
        for frozen in ("fp32", "bf16"):
            beyond, base = beyond_base(network, frozen)
            lines.append(
                f"| {network} | {frozen} | {base / 1e9:.2f} | {beyond / 1e9:.2f} | {100 * beyond / base:.1f} % |"
            )
    return "\n".join(lines)


def stored(networks: Iterable[str] = NETWORKS) -> str:
    """What the frozen network takes in each `frozen_precision`, in GB, and the share of weights that is in few bits."""
    precisions = ("fp32", "bf16", *QUANTISED)
    lines = [f"| network | in few bits | {' | '.join(precisions)} |", "|" + (2 + len(precisions)) * "---|"]
    for network in networks:
        sizes, share = [], 0.0
        for precision in precisions:
            config = load_config(network, {"precision": "bf16", "frozen_precision": precision})
            denoiser = in_precision(published(network, config.resolution), config)
            sizes.append(nbytes(own_tensors(denoiser)))
            few = sum(p.numel() for p in denoiser.parameters() if p.dtype is torch.uint8)
            share = few / sum(p.numel() for p in denoiser.parameters()) if precision == "int8" else share
        numbers = " | ".join(f"{size / 1e9:.2f}" for size in sizes)
        lines.append(f"| {network} | {100 * share:.1f} % | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the tables")
    out = parser.parse_args().out
    text = f"{table()}\n\n{bound()}\n\n{stored()}\n"
    print(text, end="")
    if out is not None:
        with atomic_file(out) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
