"""Tiny checkpoints of every family that fdistill reads, built from configs and saved as their owners publish them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from fdistill.adapters.parametrisation import TIME_CONVENTION
from fdistill.networks import EDM2Network, EDMNetwork
from support.denoisers import tiny_unet

RGB: dict[str, Any] = {"in_channels": 3, "out_channels": 3}
NO_CLASSES: dict[str, Any] = {"num_class_embeds": None}


def randomised(network: Any) -> Any:
    """Zero-initialised output layers would make every prediction the same."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return network


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    ).eval()


def _pipeline_folder(folder: Path, **components: Any) -> Path:
    """What a pipeline without a class of its own in diffusers is published as."""
    for name, component in components.items():
        component.save_pretrained(folder / name)
    return folder


def ddpm(folder: Path) -> Path:
    """google/ddpm-cifar10-32: eps, linear betas, RGB, no classes, all files in one folder."""
    DDPMPipeline(tiny_unet(**RGB, **NO_CLASSES), DDPMScheduler()).save_pretrained(folder)
    for component in ("unet", "scheduler"):
        for path in (folder / component).iterdir():
            path.rename(folder / path.name)
        (folder / component).rmdir()
    return folder


def ddpm_v(folder: Path) -> Path:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False
    )
    DDIMPipeline(tiny_unet(**NO_CLASSES), scheduler).save_pretrained(folder)
    return folder


def ddpm_x0(folder: Path) -> Path:
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False)
    DDPMPipeline(tiny_unet(**NO_CLASSES, sample_size=16), scheduler).save_pretrained(folder)
    return folder


def learned_variance(folder: Path) -> Path:
    unet = tiny_unet(in_channels=3, out_channels=6, **NO_CLASSES)
    DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range")).save_pretrained(folder)
    return folder


def class_conditional(folder: Path) -> Path:
    return _pipeline_folder(folder, unet=tiny_unet(**RGB), scheduler=DDPMScheduler())


def consistency(folder: Path) -> Path:
    """openai's consistency models in diffusers: other blocks, and the noise level as a scale and shift."""
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    ConsistencyModelPipeline(
        unet=tiny_unet(**RGB, resnet_time_scale_shift="scale_shift"), scheduler=scheduler
    ).save_pretrained(folder)
    return folder


def edm_scheduler(folder: Path) -> Path:
    return _pipeline_folder(folder, unet=tiny_unet(**RGB), scheduler=EDMEulerScheduler(sigma_max=80.0))


def flow(folder: Path) -> Path:
    return _pipeline_folder(folder, unet=tiny_unet(**RGB), scheduler=FlowMatchEulerDiscreteScheduler())


def edm_ddpmpp(folder: Path) -> Path:
    return _edm(folder, model_type="SongUNet", embedding_type="positional", encoder_type="standard", augment_dim=9)


def edm_ncsnpp(folder: Path) -> Path:
    return _edm(
        folder,
        model_type="SongUNet",
        embedding_type="fourier",
        encoder_type="residual",
        channel_mult_noise=2,
        resample_filter=[1, 3, 3, 1],
        label_dim=0,
    )


def edm_adm(folder: Path) -> Path:
    return _edm(folder, model_type="DhariwalUNet", channel_mult=[1, 2], num_blocks=1, label_dropout=0.1)


def _edm(folder: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "img_resolution": 8,
        "img_channels": 3,
        "label_dim": 10,
        "model_channels": 32,
        "channel_mult": [1, 1],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.13,
    }
    randomised(EDMNetwork(**(settings | changes))).save_pretrained(folder)
    return folder


def edm2(folder: Path) -> Path:
    randomised(EDM2Network(**_EDM2, img_channels=3)).save_pretrained(folder)
    return folder


def edm2_latent(folder: Path) -> Path:
    network = EDM2Network(
        **_EDM2, img_channels=4, latent_scale=[0.1, 0.11, 0.13, 0.15], latent_bias=[-0.7, -0.35, 0.02, 0.3]
    )
    randomised(network).save_pretrained(folder)
    tiny_vae().save_pretrained(folder / "vae")
    return folder


_EDM2: dict[str, Any] = {
    "img_resolution": 8,
    "label_dim": 10,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}


def _transformer(**changes: Any) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    }
    transformer = DiTTransformer2DModel(**(settings | changes)).eval()
    return randomised(transformer)


def dit(folder: Path) -> Path:
    """facebook/DiT-XL-2-256: eps and learned variances, a null class, an autoencoder, names of classes."""
    pipeline = DiTPipeline(_transformer(), tiny_vae(), DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(i): f"digit {i}" for i in range(10)}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def sit(folder: Path) -> Path:
    _pipeline_folder(folder, transformer=_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_vae())
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), TIME_CONVENTION: "sit"}))
    return folder


#: Name -> (what writes the checkpoint, the pipeline that its one-step student is exported as).
FAMILIES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "ddpm": (ddpm, "DDPMPipeline"),
    "ddpm-v": (ddpm_v, "DDIMPipeline"),
    "ddpm-x0": (ddpm_x0, "DDPMPipeline"),
    "learned-variance": (learned_variance, "DDPMPipeline"),
    "class-conditional": (class_conditional, "OneStepPipeline"),
    "consistency": (consistency, "ConsistencyModelPipeline"),
    "edm-scheduler": (edm_scheduler, "OneStepPipeline"),
    "flow": (flow, "OneStepPipeline"),
    "edm-ddpmpp": (edm_ddpmpp, "OneStepPipeline"),
    "edm-ncsnpp": (edm_ncsnpp, "OneStepPipeline"),
    "edm-adm": (edm_adm, "OneStepPipeline"),
    "edm2": (edm2, "OneStepPipeline"),
    "edm2-latent": (edm2_latent, "OneStepPipeline"),
    "dit": (dit, "DiTPipeline"),
    "sit": (sit, "OneStepPipeline"),
}
