"""Class-conditional diffusion transformers on latents: DiT (arXiv 2212.09748) and, with a flow-matching scheduler, SiT
(arXiv 2401.08740).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding, Timesteps
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fdistill.adapters.parametrisation import (
    DirectPrediction,
    Parametrisation,
    one_step_scheduler,
    parametrisation_from_scheduler,
)
from fdistill.base.errors import CheckpointError
from fdistill.condition import Condition, as_labels
from fdistill.denoiser import Denoiser, Features
from fdistill.prediction import Preconditioning


def _drop_variances(network: DiTTransformer2DModel) -> None:
    """Cuts the outputs that only an ancestral sampler reads."""
    transformer: Any = network
    config = transformer.config
    last: nn.Linear = transformer.proj_out_2
    kept = nn.Linear(last.in_features, config.patch_size**2 * config.in_channels)
    for name, value in last.state_dict().items():
        pixels = value.reshape(config.patch_size**2, 2 * config.in_channels, *value.shape[1:])
        kept.get_parameter(name).data.copy_(pixels[:, : config.in_channels].flatten(0, 1))
    transformer.proj_out_2 = kept.to(last.weight.device, last.weight.dtype)
    transformer.out_channels = config.in_channels
    transformer.register_to_config(out_channels=config.in_channels)


class DiTDenoiser(Denoiser):
    """A DiTTransformer2DModel and its parametrisation. Features: "block0", "block1", ... as images of tokens.

    Args:
        freq_shift: frequency i of the timestep embedding is 10000^(-i / (128 - freq_shift)). DiT and SiT were trained
            with 0; diffusers computes, and its DiTPipeline samples, with 1.
    """

    def __init__(self, network: DiTTransformer2DModel, parametrisation: Parametrisation, freq_shift: float = 1.0):
        super().__init__()
        config: Any = network.config
        if config.out_channels == 2 * config.in_channels:
            _drop_variances(network)
        elif config.out_channels not in (None, config.in_channels):
            raise CheckpointError(
                f"DiTTransformer2DModel with {config.in_channels} input and {config.out_channels} output channels: "
                "expected as many outputs as inputs, or twice as many where variances are learned"
            )
        for module in network.modules():
            if isinstance(module, Timesteps):
                module.downscale_freq_shift = freq_shift
            if isinstance(module, LabelEmbedding):
                has_null = module.embedding_table.num_embeddings > module.num_classes
                self.null_class = module.num_classes if has_null else None
                module.dropout_prob = 0.0  # in training mode it would take labels away from student and fake score
        self.network = network
        self.freq_shift = freq_shift
        self.parametrisation = parametrisation
        self.schedule = parametrisation.schedule
        self.sigma_data = parametrisation.sigma_data
        self.kind = parametrisation.kind
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.num_classes = config.num_embeds_ada_norm
        tokens = config.sample_size // config.patch_size
        width = config.num_attention_heads * config.attention_head_dim
        self.feature_shapes = {f"block{i}": (width, tokens, tokens) for i in range(config.num_layers)}

    def with_network(self, network: DiTTransformer2DModel) -> DiTDenoiser:
        """The same reading of another network of this class."""
        return DiTDenoiser(network, self.parametrisation, self.freq_shift)

    def preconditioning(self, t: Tensor) -> Preconditioning:
        return self.parametrisation.preconditioning(t)

    # DiTTransformer2DModel's own forward, block by block, so that features can be read without hooks and what lies
    # beyond them can be left out; test_dit holds it to the model's output bit by bit.
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
        transformer: Any = self.network
        labels = as_labels(condition, self.num_classes)
        assert labels is not None
        timestep = self.parametrisation.timestep(t)
        names = list(self.feature_shapes)
        last = max((names.index(name) for name in features), default=-1)
        hidden = transformer.pos_embed(network_input)
        tapped: Features = {}
        for i, block in enumerate(transformer.transformer_blocks):
            if i > last and not output:
                return None, tapped
            # Without output gradients only the features do.
            with nullcontext() if output_grad or i <= last else torch.no_grad():
                hidden = block(hidden, timestep=timestep, class_labels=labels)
            if names[i] in features:
                tapped[names[i]] = rearrange(hidden, "b (h w) c -> b c h w", h=self.feature_shapes[names[i]][1])
        if not output:
            return None, tapped
        with nullcontext() if output_grad else torch.no_grad():
            return self._project(hidden, timestep, labels), tapped

    def _project(self, hidden: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        transformer: Any = self.network
        embedding = transformer.transformer_blocks[0].norm1.emb(timestep, labels, hidden_dtype=hidden.dtype)
        shift, scale = transformer.proj_out_1(F.silu(embedding)).chunk(2, dim=1)
        hidden = transformer.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None]
        size = self.sample_shape[1] // transformer.config.patch_size
        patches: Tensor = transformer.proj_out_2(hidden)
        return rearrange(
            patches,
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=size,
            p=transformer.config.patch_size,
            q=transformer.config.patch_size,
        )


NETWORK = DiTTransformer2DModel
#: A key of ours in the scheduler's config, which `fdistill convert` writes for the published state dicts.
FREQ_SHIFT = "downscale_freq_shift"


def wrap(network: DiTTransformer2DModel, scheduler: Mapping[str, Any] | None) -> DiTDenoiser:
    """The denoiser of a network and the config of the scheduler beside it; CheckpointError if they do not fit."""
    form = parametrisation_from_scheduler(scheduler)
    return DiTDenoiser(network, form, float((scheduler or {}).get(FREQ_SHIFT, 1.0)))


def native_pipeline(
    denoiser: Denoiser, levels: Sequence[float], index: Mapping[str, Any], vae: AutoencoderKL | None
) -> tuple[DiffusionPipeline, dict[str, Any]] | None:
    """A DiTPipeline that runs a student at these levels, and the arguments it has to be called with; or None.

    Args:
        index: model_index.json of the teacher, with the names of its classes; empty if it has none.
    """
    assert isinstance(denoiser, DiTDenoiser)
    form, scaling = denoiser.parametrisation, denoiser.latent_scaling
    if vae is None or len(levels) != 1 or denoiser.freq_shift != 1 or not isinstance(form, DirectPrediction):
        return None
    scheduler = one_step_scheduler(form, levels[0])
    if scheduler is None or scaling is None or any(scaling.bias) or set(scaling.scale) != {vae.config.scaling_factor}:
        return None
    id2label = index.get("id2label") if isinstance(index.get("id2label"), dict) else None
    pipeline = DiTPipeline(transformer=denoiser.network, vae=vae, scheduler=scheduler, id2label=id2label)
    if id2label:
        pipeline.register_to_config(id2label=id2label)
    return pipeline, {"num_inference_steps": 1, "guidance_scale": 1.0}
