"""What fdistill does with each field of a config that it reads: used, without effect, or refused.

A field that is silently unread gives a student that is silently wrong. So a field that is in no table here is refused
by name, unless it has the default of its class. A test compares the tables with the constructors of the installed
libraries: a release with a new field turns that test red.

"Used" includes what the class's own constructor and forward use, where these are what runs here. Keys that begin with
an underscore are notes of diffusers and transformers to themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fdistill.base.errors import CheckpointError


@dataclass(frozen=True)
class Refusal:
    """Why a field is refused, and the values at which it does nothing and is not."""

    why: str
    harmless: tuple[Any, ...] = (None,)


@dataclass(frozen=True)
class Fields:
    """The fields of one class of config.

    Attributes:
        used: they change what is computed, and are read.
        without_effect: whatever they say, nothing that is computed here depends on it.
        refused: name -> why, and at which values it is not.
    """

    used: frozenset[str]
    without_effect: frozenset[str] = frozenset()
    refused: Mapping[str, Refusal] = field(default_factory=dict)

    @property
    def known(self) -> frozenset[str]:
        """All fields of the table."""
        return self.used | self.without_effect | self.refused.keys()


def check_fields(what: str, fields: Fields, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Checks a config against its table.

    Args:
        what: the class, for messages.
        fields: the table of the class.
        config: as JSON has it.
        defaults: of the class's constructor in the installed library.

    Raises:
        CheckpointError: a field is refused, or is in no part of the table and has not its default; the message names
            it and the value at which it would be harmless.
    """
    for name, value in config.items():
        if name.startswith("_") or name in fields.used or name in fields.without_effect:
            continue
        refusal = fields.refused.get(name)
        if refusal is None and name not in defaults:
            raise CheckpointError(
                f"{what} with {name} {value!r}: this version does not know the field, and would ignore it; expected a "
                "config without it"
            )
        why = "this version does not read the field" if refusal is None else refusal.why
        harmless = (defaults[name],) if refusal is None else refusal.harmless
        if not any(_plain(value) == _plain(other) for other in harmless):
            raise CheckpointError(f"{what} with {name} {value!r}: {why}; expected {' or '.join(map(repr, harmless))}")


def _plain(value: Any) -> Any:
    """JSON knows no tuples."""
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def constructor_defaults(cls: type[Any]) -> dict[str, Any]:
    """Name -> default of every argument of a class's constructor; those without a default are None."""
    empty = inspect.Parameter.empty
    arguments = inspect.signature(cls.__init__).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        argument.name: None if argument.default is empty else argument.default
        for argument in arguments
        if argument.name != "self" and argument.kind not in kinds
    }


def names(*texts: str) -> frozenset[str]:
    """Names that are separated by spaces."""
    return frozenset(name for text in texts for name in text.split())


def refusals(text: str, why: str, *harmless: Any) -> dict[str, Refusal]:
    """Names, separated by spaces, that are refused for one reason; without harmless values, None is the only one."""
    return {name: Refusal(why, harmless or (None,)) for name in text.split()}


#: Of all networks, autoencoders and text encoders.
QUANTIZED = refusals("quantization_config", "quantized weights are not read")
#: Fields of the class Transformer2DModel, as which older versions of diffusers saved DiT and PixArt.
_EARLIER = {
    **refusals("num_vector_embeds", "networks of discrete latents are not supported"),
    **refusals("only_cross_attention double_self_attention use_linear_projection", "its blocks are others", False),
}
_DROPOUT = "dropout"  # set to 0: a sample depends on its noise alone, in training mode too

_UNET = (
    "sample_size in_channels out_channels center_input_sample time_embedding_dim freq_shift flip_sin_to_cos "
    "down_block_types mid_block_type up_block_types block_out_channels layers_per_block mid_block_scale_factor "
    "downsample_padding act_fn attention_head_dim norm_num_groups norm_eps resnet_time_scale_shift"
)
_TRANSFORMER = "sample_size in_channels out_channels patch_size num_layers num_attention_heads attention_head_dim"
_OLDER_TRANSFORMER = (
    f"{_TRANSFORMER} attention_bias activation_fn upcast_attention norm_type norm_elementwise_affine norm_eps"
)

#: Class of a network -> its fields.
NETWORK_FIELDS: dict[str, Fields] = {
    "UNet2DModel": Fields(
        names(_UNET, "downsample_type upsample_type attn_norm_num_groups add_attention num_class_embeds"),
        names(_DROPOUT, "num_train_timesteps"),  # the latter is the size of a learned embedding of timesteps
        {
            **refusals("time_embedding_type", "it embeds whole timesteps alone", "positional", "fourier"),
            **refusals("class_embed_type", "it takes embeddings instead of labels", None, "timestep"),
            **QUANTIZED,
        },
    ),
    "UNet2DConditionModel": Fields(
        names(
            _UNET,
            "only_cross_attention cross_attention_dim transformer_layers_per_block num_attention_heads "
            "reverse_transformer_layers_per_block use_linear_projection addition_time_embed_dim upcast_attention "
            "resnet_skip_time_act resnet_out_scale_factor time_embedding_type time_embedding_act_fn timestep_post_act "
            "conv_in_kernel conv_out_kernel projection_class_embeddings_input_dim mid_block_only_cross_attention "
            "cross_attention_norm",
        ),
        names(_DROPOUT, "addition_embed_type_num_heads"),  # the latter is of an addition_embed_type that is refused
        {
            **refusals(
                "time_cond_proj_dim",
                "it was distilled already (a latent consistency model) and takes the guidance scale as an input; use "
                "the model that it was distilled from as the teacher",
            ),
            **refusals(
                "addition_embed_type", "networks of Stable Diffusion 1, 2 and XL are supported", None, "text_time"
            ),
            **refusals("class_embed_type num_class_embeds", "networks with classes and prompts are not supported"),
            **refusals("class_embeddings_concat", "networks with classes and prompts are not supported", False),
            **refusals("encoder_hid_dim encoder_hid_dim_type", "it takes images, or prompts of other encoders"),
            **refusals("dual_cross_attention", "it takes an image beside the prompt", False),
            **refusals("attention_type", "it takes boxes beside the prompt", "default"),
            **QUANTIZED,
        },
    ),
    "SD3Transformer2DModel": Fields(
        names(
            _TRANSFORMER,
            "joint_attention_dim caption_projection_dim pooled_projection_dim pos_embed_max_size "
            "dual_attention_layers qk_norm",
        ),
        refused=QUANTIZED,
    ),
    "FluxTransformer2DModel": Fields(
        names(
            "patch_size in_channels out_channels num_layers num_single_layers attention_head_dim num_attention_heads "
            "joint_attention_dim pooled_projection_dim guidance_embeds axes_dims_rope"
        ),
        refused=QUANTIZED,
    ),
    "Flux2Transformer2DModel": Fields(
        names(
            "patch_size in_channels out_channels num_layers num_single_layers attention_head_dim num_attention_heads "
            "joint_attention_dim timestep_guidance_channels mlp_ratio axes_dims_rope rope_theta eps guidance_embeds"
        ),
        refused=QUANTIZED,
    ),
    "PixArtTransformer2DModel": Fields(
        names(_OLDER_TRANSFORMER, "cross_attention_dim interpolation_scale use_additional_conditions caption_channels"),
        names(_DROPOUT, "norm_num_groups num_embeds_ada_norm"),  # of other networks of the same blocks
        {**refusals("attention_type", "it takes boxes beside the prompt", "default"), **_EARLIER, **QUANTIZED},
    ),
    "SanaTransformer2DModel": Fields(
        names(
            _TRANSFORMER,
            "num_cross_attention_heads cross_attention_head_dim cross_attention_dim caption_channels mlp_ratio "
            "attention_bias norm_elementwise_affine norm_eps interpolation_scale qk_norm timestep_scale",
        ),
        names(_DROPOUT, "guidance_embeds_scale"),
        {
            **refusals(
                "guidance_embeds",
                "it was distilled already (Sana-Sprint) and takes the guidance scale as an input; use the model that "
                "it was distilled from as the teacher",
                False,
            ),
            **QUANTIZED,
        },
    ),
    "DiTTransformer2DModel": Fields(
        names(_OLDER_TRANSFORMER, "num_embeds_ada_norm"),
        names(_DROPOUT, "norm_num_groups"),
        {
            **refusals("cross_attention_dim caption_channels", "it takes prompts"),
            **refusals("attention_type", "it takes boxes beside the label", "default"),
            **refusals("interpolation_scale use_additional_conditions", "it is of PixArt"),
            **_EARLIER,
            **QUANTIZED,
        },
    ),
    "QwenImageTransformer2DModel": Fields(
        names(
            "patch_size in_channels out_channels num_layers attention_head_dim num_attention_heads joint_attention_dim "
            "axes_dims_rope"
        ),
        names("pooled_projection_dim"),  # of its first release
        {
            **refusals(
                "guidance_embeds zero_cond_t use_additional_t_cond use_layer3d_rope",
                "of Qwen-Image's networks the text-to-image one is supported; editing, layered and "
                "guidance-distilled ones are not",
                False,
            ),
            **QUANTIZED,
        },
    ),
    "ZImageTransformer2DModel": Fields(
        names(
            "all_patch_size all_f_patch_size in_channels dim n_layers n_refiner_layers n_heads n_kv_heads norm_eps "
            "qk_norm cap_feat_dim rope_theta t_scale axes_dims axes_lens"
        ),
        refused={
            **refusals(
                "siglip_feat_dim",
                "of Z-Image's networks the text-to-image one is supported; the one that also takes images is not",
            ),
            **QUANTIZED,
        },
    ),
    "Lumina2Transformer2DModel": Fields(
        names(
            "sample_size patch_size in_channels out_channels hidden_size num_layers num_refiner_layers "
            "num_attention_heads num_kv_heads multiple_of ffn_dim_multiplier norm_eps axes_dim_rope axes_lens "
            "cap_feat_dim"
        ),
        names("scaling_factor"),  # which the network does not read
        refused=QUANTIZED,
    ),
    "EDMNetwork": Fields(
        names(
            "model_type img_resolution img_channels label_dim sigma_min sigma_max sigma_data augment_dim "
            "model_channels channel_mult channel_mult_emb num_blocks attn_resolutions label_dropout embedding_type "
            "channel_mult_noise encoder_type decoder_type resample_filter"
        ),
        names(_DROPOUT),
    ),
    "EDM2Network": Fields(
        names(
            "img_resolution img_channels label_dim sigma_min sigma_max sigma_data model_channels channel_mult "
            "channel_mult_noise channel_mult_emb num_blocks attn_resolutions label_balance concat_balance "
            "channels_per_head res_balance attn_balance clip_act label_dropout latent_scale latent_bias pixel_range"
        ),
        names(_DROPOUT, "logvar_channels"),  # the latter only weighs the loss of EDM2's own training
    ),
}

#: Class of an autoencoder -> its fields. `_own_scaling` of teachers/autoencoder.py reads statistics of latents.
AUTOENCODER_FIELDS: dict[str, Fields] = {
    "AutoencoderKL": Fields(
        names(
            "in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block act_fn "
            "latent_channels norm_num_groups scaling_factor shift_factor latents_mean latents_std use_quant_conv "
            "use_post_quant_conv mid_block_add_attention"
        ),
        names("sample_size force_upcast"),  # the size of tiles; and float32 is what it runs in here
        QUANTIZED,
    ),
    "AutoencoderDC": Fields(
        names(
            "in_channels latent_channels attention_head_dim upsample_block_type downsample_block_type "
            "decoder_norm_types decoder_act_fns encoder_out_shortcut decoder_in_shortcut decoder_conv_act_fn "
            "scaling_factor",
            *(
                f"{half}_{name}"
                for half in ("encoder", "decoder")
                for name in ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales")
            ),
        ),
        refused=QUANTIZED,
    ),
    "AutoencoderKLQwenImage": Fields(
        names(
            "base_dim z_dim dim_mult num_res_blocks attn_scales temperal_downsample latents_mean latents_std "
            "input_channels"
        ),
        names(_DROPOUT),
        QUANTIZED,
    ),
}

AUTOENCODER_FIELDS["AutoencoderKLFlux2"] = Fields(
    names(
        "in_channels out_channels down_block_types up_block_types block_out_channels decoder_block_out_channels "
        "layers_per_block act_fn latent_channels norm_num_groups use_quant_conv use_post_quant_conv "
        "mid_block_add_attention batch_norm_eps"
    ),
    # The size of tiles, float32, which it runs in here, and how statistics were learned that are only read now.
    names("sample_size force_upcast batch_norm_momentum"),
    {**refusals("patch_size", "its pipelines cut patches of 2 x 2", (2, 2)), **QUANTIZED},
)

#: Of all schedulers, because a config that diffusers makes of another class's config keeps that class's fields.
SCHEDULER_FIELDS = Fields(
    names(
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr prediction_type "
        "sigma_min sigma_max sigma_data use_flow_sigmas",
        "time_convention downscale_freq_shift guidance_channels has_null_class",  # fdistill's own
    ),
    # How a sampler goes from one level to the next: students have a sampler of their own, and so have teacher samples.
    names(
        "variance_type clip_sample clip_sample_range clip_denoised thresholding dynamic_thresholding_ratio "
        "sample_max_value timestep_spacing steps_offset set_alpha_to_one skip_prk_steps s_noise eta rho "
        "solver_order solver_type algorithm_type lower_order_final euler_at_final final_sigmas_type predict_x0 "
        "disable_corrector solver_p predictor_order corrector_order tau_func lambda_min_clipped noise_sampler_seed "
        "original_inference_steps timestep_scaling interpolation_type sigma_schedule use_karras_sigmas "
        "use_exponential_sigmas use_beta_sigmas use_lu_lambdas flow_shift shift use_dynamic_shifting base_shift "
        "max_shift base_image_seq_len max_image_seq_len shift_terminal time_shift_type stochastic_sampling "
        "upscale_mode tensor_format"
    ),
    {
        **refusals("timestep_type", "networks that take ln sigma / 4 as their timestep are not supported", "discrete"),
        **refusals("invert_sigmas", "networks whose time runs from noise to data are not supported", False),
        **refusals("snr_shift_scale", "shifted noise schedules are not supported", 1, 1.0),
        **refusals("predict_epsilon", "older name of prediction_type 'sample', to be set instead", True),
        **refusals("scale_factors", "students that draw one scale after another are not supported"),
        **refusals("timestep_values", "schedules of chosen timesteps are not supported"),
    },
)


def check_network(network: Any) -> None:
    """Raises CheckpointError for a network whose config holds a field that is refused or unknown."""
    check_network_config(type(network), network.config)


def check_network_config(cls: type[Any], config: Mapping[str, Any]) -> None:
    """As `check_network`, of a network's class and config."""
    if cls.__name__ in NETWORK_FIELDS:  # not for a family of the user's own
        check_fields(cls.__name__, NETWORK_FIELDS[cls.__name__], config, constructor_defaults(cls))
