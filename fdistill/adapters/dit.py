"""Class-conditional diffusion transformers on latents: DiT (arXiv 2212.09748) and, with a flow-matching scheduler, SiT
(arXiv 2401.08740).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding, Timesteps
from einops import rearrange
from torch import Tensor

from fdistill.adapters.config_fields import check_network
from fdistill.adapters.family import Family, Runnable
from fdistill.adapters.float32_layers import amplified_output_in_float32
from fdistill.adapters.parametrisation import (
    DirectPrediction,
    Parametrisation,
    one_step_scheduler,
    parametrisation_from_scheduler,
)
from fdistill.adapters.taps import run_tapped
from fdistill.adapters.variances import without_dropout, without_variances
from fdistill.condition import Condition, as_labels
from fdistill.denoiser import Denoiser, Features
from fdistill.prediction import Preconditioning


class Published(NamedTuple):
    """What `fdistill convert` notes of published state dicts of DiT and SiT, in the scheduler's config.

    Attributes:
        freq_shift: frequency i of the timestep embedding is 10000^(-i / (128 - freq_shift)). DiT and SiT were trained
            with 0; diffusers uses 1.
        guidance_channels: how many of the first channels guidance acts on. It is 3 of 4 in the published code
            (`forward_with_cfg` of facebookresearch/DiT, and of SiT); None: all, as in diffusers.
        has_null_class: whether the last row of the label embedding means "no class".
    """

    freq_shift: float = 1.0
    guidance_channels: int | None = None
    has_null_class: bool = True

    @classmethod
    def of(cls, scheduler: Mapping[str, Any]) -> Published:
        """From a scheduler's config; keys that are not there have diffusers' meaning."""
        values = {name: scheduler[key] for name, key in _KEYS.items() if key in scheduler}
        return cls(**values)

    def keys(self) -> dict[str, Any]:
        """The keys of the scheduler's config."""
        return {_KEYS[name]: value for name, value in self._asdict().items()}


_KEYS = {
    "freq_shift": "downscale_freq_shift",
    "guidance_channels": "guidance_channels",
    "has_null_class": "has_null_class",
}


class DiTDenoiser(Denoiser):
    """A DiTTransformer2DModel and its parametrisation.

    Features: "block0", "block1", ..., the outputs of the blocks as images [B, C, H, W] with one pixel per token.

    Args:
        published: what the published state dicts mean, where it differs from what diffusers' DiTPipeline assumes.
    """

    parametrisation: Parametrisation

    def __init__(
        self, network: DiTTransformer2DModel, parametrisation: Parametrisation, published: Published | None = None
    ):
        super().__init__()
        check_network(network)
        published = published or Published()
        config: Any = network.config
        without_variances(network, "proj_out_2")
        amplified_output_in_float32(network, "proj_out_2", parametrisation)
        for module in network.modules():
            if isinstance(module, Timesteps):
                module.downscale_freq_shift = published.freq_shift
            if isinstance(module, LabelEmbedding):
                has_null = published.has_null_class and module.embedding_table.num_embeddings > module.num_classes
                self.null_class = module.num_classes if has_null else None
                module.dropout_prob = 0.0  # in training mode it would drop labels of the student and the fake score
        self.network = without_dropout(network)
        self.published = published
        self.guidance_channels = published.guidance_channels
        self.parametrisation = parametrisation
        self.schedule = parametrisation.schedule
        self.sigma_data = parametrisation.sigma_data
        self.kind = parametrisation.kind
        self.loss_weighting = parametrisation.loss_weighting
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.num_classes = config.num_embeds_ada_norm
        tokens = config.sample_size // config.patch_size
        width = config.num_attention_heads * config.attention_head_dim
        self.feature_shapes = {f"block{i}": (width, tokens, tokens) for i in range(config.num_layers)}

    def with_network(self, network: DiTTransformer2DModel) -> DiTDenoiser:
        """A denoiser of another network of this class, with the same parametrisation."""
        return DiTDenoiser(network, self.parametrisation, self.published)

    def preconditioning(self, t: Tensor) -> Preconditioning:
        return self.parametrisation.preconditioning(t)

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
        network: Any = self.network
        labels, timestep = as_labels(condition, self.num_classes), self.parametrisation.timestep(t)
        return run_tapped(
            lambda: network(network_input, timestep, labels, return_dict=False)[0],
            {f"block{i}": block for i, block in enumerate(network.transformer_blocks)},
            self._image,
            features,
            output=output,
            output_grad=output_grad,
        )

    def _image(self, name: str, tokens: Tensor) -> Tensor:
        """A block's output [B, H * W, C] as a feature [B, C, H, W]."""
        return rearrange(tokens, "b (h w) c -> b c h w", h=self.feature_shapes[name][1])


def wrap(network: DiTTransformer2DModel, scheduler: Mapping[str, Any] | None) -> DiTDenoiser:
    """Builds the denoiser from a network and its scheduler's config; raises CheckpointError if they do not fit."""
    return DiTDenoiser(network, parametrisation_from_scheduler(scheduler), Published.of(scheduler or {}))


def native_pipeline(
    denoiser: DiTDenoiser, levels: Sequence[float], index: Mapping[str, Any], vae: AutoencoderKL | None
) -> Runnable | None:
    """See `Family`: a DiTPipeline that keeps the names of the teacher's classes."""
    form, scaling = denoiser.parametrisation, denoiser.latent_scaling
    if vae is None or len(levels) != 1 or denoiser.published.freq_shift != 1 or not isinstance(form, DirectPrediction):
        return None
    scheduler = one_step_scheduler(form, levels[0])
    if scheduler is None or scaling is None or any(scaling.bias) or set(scaling.scale) != {vae.config.scaling_factor}:
        return None
    id2label = index.get("id2label") if isinstance(index.get("id2label"), dict) else None
    pipeline = DiTPipeline(transformer=denoiser.network, vae=vae, scheduler=scheduler, id2label=id2label)
    if id2label:
        pipeline.register_to_config(id2label=id2label)
    return pipeline, {"num_inference_steps": 1, "guidance_scale": 1.0}


def earlier_config(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a DiT that an older diffusers saved as a Transformer2DModel, as facebook/DiT-XL-2-256."""
    return config.get("_class_name") == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"


FAMILY = Family(
    DiTTransformer2DModel,
    wrap,
    native_pipeline,
    earlier_config=earlier_config,
    guidance_labels={"DiTPipeline": 1000},
)
