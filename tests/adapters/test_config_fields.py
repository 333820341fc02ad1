"""Every field of every config that is read here is used, without effect, or refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
)

from fdistill.adapters import FAMILIES, flux, sd3, unet2d, unet2d_condition, wrap
from fdistill.adapters.checkpoint import load_teacher, resolve_checkpoint
from fdistill.adapters.config_fields import (
    AUTOENCODER_FIELDS,
    NETWORK_FIELDS,
    SCHEDULER_FIELDS,
    Fields,
    check_fields,
    constructor_defaults,
)
from fdistill.adapters.encoder_fields import TEXT_ENCODER_FIELDS
from fdistill.adapters.parametrisation import (
    parametrisation_from_scheduler,
    scheduler_config,
    student_scheduler,
)
from fdistill.base.errors import CheckpointError
from fdistill.formats.peft_config import PEFT_FIELDS
from fdistill.generation.diffusers_pipeline import only_diffusers_runs
from fdistill.teachers.autoencoder import AUTOENCODERS
from fdistill.teachers.teacher import TeacherSettings, open_teacher
from fdistill.teachers.text_encoders import open_prompt_encoder
from support.denoisers import tiny_unet
from support.families import dit
from support.text_families import flux_transformer, sd3_transformer, sd15, sdxl, tiny_condition_unet

DDPM, FLOW = scheduler_config(DDPMScheduler()), scheduler_config(FlowMatchEulerDiscreteScheduler())


def tables() -> dict[str, tuple[Fields, set[str]]]:
    """Class -> its table, and the fields that the installed libraries know."""
    found: dict[str, tuple[Fields, set[str]]] = {}
    for name, family in FAMILIES.items():
        found[name] = NETWORK_FIELDS[name], set(constructor_defaults(family.network))
    for name in AUTOENCODERS:
        found[name] = AUTOENCODER_FIELDS[name], set(constructor_defaults(getattr(diffusers, name)))
    for name, fields in TEXT_ENCODER_FIELDS.items():
        config = getattr(transformers, name).config_class().to_dict()
        nested = {key for key in config.get("text_config", {}) if not key.startswith("_")}
        found[name] = fields, {key for key in config if not key.startswith("_")} | nested
    found["LoraConfig"] = PEFT_FIELDS, {field.name for field in dataclasses.fields(peft.LoraConfig)}
    return found


@pytest.mark.parametrize("name", tables())
def test_every_field_of_the_installed_class_is_in_its_table(name: str) -> None:
    """If this is red, a library has a new field: find out what it does, and write it into one of the three parts."""
    fields, known = tables()[name]
    assert known - fields.known == set()
    assert fields.used.isdisjoint(fields.without_effect)
    assert fields.refused.keys().isdisjoint(fields.used | fields.without_effect)


def test_every_field_of_every_scheduler_that_is_read_is_in_the_table() -> None:
    read = {"CMStochasticIterativeScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}
    read |= {"FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"}
    fields: dict[str, set[str]] = {}
    for name in dir(diffusers):
        if not name.endswith("Scheduler") or name.startswith("Flax"):
            continue
        cls = getattr(diffusers, name)
        if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
            continue
        known = set(constructor_defaults(cls))
        if name in read or "beta_schedule" in known:
            fields[name] = known - SCHEDULER_FIELDS.known
    assert len(fields) > 20
    assert {name: missing for name, missing in fields.items() if missing} == {}


@pytest.mark.parametrize("fields", [*NETWORK_FIELDS.values(), SCHEDULER_FIELDS])
def test_what_is_refused_is_not_refused_at_the_value_it_is_harmless_at(fields: Fields) -> None:
    assert all(refusal.harmless for refusal in fields.refused.values())


@pytest.mark.parametrize(
    ("wrapped", "make", "changes", "message"),
    [
        (
            unet2d_condition.wrap,
            tiny_condition_unet,
            {"time_cond_proj_dim": 16},
            "time_cond_proj_dim 16: .*expected None",
        ),
        (unet2d_condition.wrap, tiny_condition_unet, {"encoder_hid_dim": 24}, "encoder_hid_dim 24"),
        (unet2d_condition.wrap, tiny_condition_unet, {"attention_type": "gated"}, "attention_type 'gated'.*'default'"),
        (unet2d_condition.wrap, tiny_condition_unet, {"num_class_embeds": 3}, "num_class_embeds 3"),
        (
            unet2d_condition.wrap,
            tiny_condition_unet,
            {"class_embed_type": "timestep"},
            "class_embed_type 'timestep': .*expected None",
        ),
        (unet2d.wrap, tiny_unet, {"class_embed_type": "identity"}, "class_embed_type 'identity'"),
        (
            unet2d.wrap,
            tiny_unet,
            {"class_embed_type": "timestep", "num_class_embeds": None},
            "without num_class_embeds: the number",
        ),
        (
            unet2d.wrap,
            tiny_unet,
            {"time_embedding_type": "learned", "num_train_timesteps": 1000},
            "time_embedding_type 'learned': .*expected 'positional' or 'fourier'",
        ),
    ],
)
def test_networks_that_want_another_input_are_refused(
    wrapped: Callable[..., Any], make: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        wrapped(make(**changes), DDPM)


def changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_unknown_fields_are_refused_by_name_and_defaults_are_not(tmp_path: Path) -> None:
    folder = dit(tmp_path / "dit")
    changed(folder / "transformer" / "config.json", _note="of diffusers itself", dropout=0.0)
    load_teacher(folder)
    for part in ("transformer", "vae", "scheduler"):
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        before = path.read_text()
        changed(path, more_of_it=3)
        with pytest.raises(CheckpointError, match=r"with more_of_it 3: this version does not know.*without it"):
            open_teacher(TeacherSettings(str(folder)))
        path.write_text(before)
    open_teacher(TeacherSettings(str(folder)))


def test_fields_of_text_encoders_are_refused_by_name(tmp_path: Path) -> None:
    folder = sd15(tmp_path / "sd15")
    path = folder / "text_encoder" / "config.json"
    before = path.read_text()
    for change, message in (
        ({"quantization_config": {"load_in_8bit": True}}, "CLIPTextModel with quantization_config .*expected None"),
        ({"depth_of_it": 3}, "CLIPTextModel with depth_of_it 3"),
    ):
        changed(path, **change)
        with pytest.raises(CheckpointError, match=message):
            open_prompt_encoder(resolve_checkpoint(folder), 16)
        path.write_text(before)
    open_prompt_encoder(resolve_checkpoint(folder), 16)


@pytest.mark.parametrize(
    ("scheduler", "changes", "message"),
    [
        (EulerDiscreteScheduler, {"timestep_type": "continuous"}, "timestep_type 'continuous': .*expected 'discrete'"),
        (FlowMatchEulerDiscreteScheduler, {"invert_sigmas": True}, "invert_sigmas True: .*expected False"),
        (
            DPMSolverMultistepScheduler,
            {"use_flow_sigmas": True},
            "contradict each other; expected use_flow_sigmas False",
        ),
        (
            DPMSolverMultistepScheduler,
            {"prediction_type": "flow_prediction"},
            "contradict each other; expected use_flow_sigmas True",
        ),
        (DDPMScheduler, {"predict_epsilon": False}, "predict_epsilon False: .*expected True"),
        (diffusers.CogVideoXDDIMScheduler, {}, r"snr_shift_scale 3\.0: .*expected 1"),
    ],
)
def test_schedulers_that_mean_something_else_are_refused(
    scheduler: type[Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        parametrisation_from_scheduler({"_class_name": scheduler.__name__, **scheduler().config, **changes})


def test_what_a_config_leaves_out_is_its_own_classes_default() -> None:
    """diffusers' LCM has the betas of Stable Diffusion, and most other classes those of DDPM."""
    found: Any = parametrisation_from_scheduler({"_class_name": "LCMScheduler"}).schedule
    assert torch.equal(found.alphas_cumprod.float(), LCMScheduler().alphas_cumprod)
    assert not torch.equal(found.alphas_cumprod.float(), DDIMScheduler().alphas_cumprod)


def test_the_number_of_timesteps_of_a_flow_is_read_and_exported() -> None:
    half = FLOW | {"num_train_timesteps": 500}
    with pytest.raises(CheckpointError, match="num_train_timesteps 500: its pipeline divides timesteps by 1000"):
        flux.wrap(flux_transformer(), half)
    form = sd3.wrap(sd3_transformer(), half).parametrisation
    assert form.timestep(torch.ones(1)).item() == 500
    for levels in ([1.0], [1.0, 0.5]):
        found = student_scheduler(form, levels)
        assert found is not None
        found[0].set_timesteps(sigmas=levels)
        assert found[0].timesteps[0].item() == 500


def test_dropout_is_off_in_training_mode_too() -> None:
    """Otherwise a student's sample would depend on torch's global generator, and a resumed run would differ."""
    for network in (tiny_unet(dropout=0.5), tiny_condition_unet(dropout=0.5)):
        denoiser = wrap(network, DDPM).train()
        condition = denoiser.example_condition(1, "cpu")
        x_t, t = torch.randn(1, *denoiser.sample_shape), torch.full((1,), 500.0)
        assert torch.equal(denoiser(x_t, t, condition), denoiser(x_t, t, condition))
        assert network.config.dropout == 0


def test_a_dit_as_it_was_first_published_is_read(tmp_path: Path) -> None:
    """As facebook/DiT-XL-2-256: of a class from before DiTTransformer2DModel, with settings that it does not have."""
    folder = dit(tmp_path / "dit")
    expected = load_teacher(folder)
    changed(
        folder / "transformer" / "config.json",
        _class_name="Transformer2DModel",
        cross_attention_dim=None,
        num_vector_embeds=None,
        only_cross_attention=False,
        use_linear_projection=False,
    )
    found = load_teacher(folder)
    x_t, t, labels = torch.randn(2, *found.sample_shape), torch.full((2,), 500.0), torch.tensor([1, 3])
    assert torch.equal(found(x_t, t, labels), expected(x_t, t, labels))
    changed(folder / "transformer" / "config.json", num_vector_embeds=8)
    with pytest.raises(CheckpointError, match="num_vector_embeds 8"):
        load_teacher(folder)


def test_a_students_own_settings_are_checked_too() -> None:
    from fdistill.adapters.resize import resized
    from fdistill.base.errors import ConfigError

    denoiser = wrap(tiny_condition_unet(), DDPM)
    with pytest.raises(ConfigError, match="time_cond_proj_dim 16"):
        resized(denoiser, {"time_cond_proj_dim": 16})


def test_the_embedding_of_a_guidance_scale_is_refused_in_a_teachers_folder(tmp_path: Path) -> None:
    folder = sdxl(tmp_path / "sdxl")
    network = tiny_condition_unet(time_cond_proj_dim=16)
    network.save_pretrained(folder / "unet")
    with pytest.raises(
        CheckpointError, match=r"sdxl: UNet2DConditionModel with time_cond_proj_dim 16: .*distilled already"
    ):
        load_teacher(folder)
    assert only_diffusers_runs(folder)  # so that it can be evaluated by its own pipeline
    assert not only_diffusers_runs(sdxl(tmp_path / "read"))


#: Fields that published configs have beside those of the class, or instead of them, with their values.
PUBLISHED: dict[str, tuple[Fields, type[Any] | None, dict[str, Any]]] = {
    "stable-diffusion-v1-5 scheduler": (
        SCHEDULER_FIELDS,
        diffusers.PNDMScheduler,
        {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "trained_betas": None},
    ),
    "stable-diffusion-xl-base-1.0 scheduler": (
        SCHEDULER_FIELDS,
        EulerDiscreteScheduler,
        {"clip_sample": False, "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True},
    ),
    "playground-v2.5 vae": (
        AUTOENCODER_FIELDS["AutoencoderKL"],
        diffusers.AutoencoderKL,
        {"latents_mean": [-1.6574], "latents_std": [8.4927], "force_upcast": True},
    ),
    "DiT-XL-2-256": (
        NETWORK_FIELDS["DiTTransformer2DModel"],
        diffusers.DiTTransformer2DModel,
        {"cross_attention_dim": None, "num_vector_embeds": None, "only_cross_attention": False, "norm_num_groups": 32},
    ),
    "PixArt-XL-2-1024-MS": (
        NETWORK_FIELDS["PixArtTransformer2DModel"],
        diffusers.PixArtTransformer2DModel,
        {"double_self_attention": False, "num_vector_embeds": None, "use_linear_projection": False},
    ),
    "Sana_1600M": (
        NETWORK_FIELDS["SanaTransformer2DModel"],
        diffusers.SanaTransformer2DModel,
        {"guidance_embeds": False, "guidance_embeds_scale": 0.1, "timestep_scale": 1.0, "mlp_ratio": 2.5},
    ),
    "CLIP ViT-L/14": (
        TEXT_ENCODER_FIELDS["CLIPTextModel"],
        None,
        {
            "dropout": 0.0,
            "torch_dtype": "float32",
            "transformers_version": "4.21.0.dev0",
            "model_type": "clip_text_model",
        },
    ),
    "T5 v1.1 XXL": (
        TEXT_ENCODER_FIELDS["T5EncoderModel"],
        None,
        {
            "decoder_start_token_id": 0,
            "dense_act_fn": "gelu_new",
            "is_gated_act": True,
            "output_past": True,
            "tie_word_embeddings": False,
            "n_positions": 512,
        },
    ),
    "Gemma 2": (
        TEXT_ENCODER_FIELDS["Gemma2Model"],
        None,
        {
            "cache_implementation": "hybrid",
            "hidden_act": "gelu_pytorch_tanh",
            "rope_theta": 10000.0,
            "sliding_window_size": 4096,
            "attn_logit_softcapping": 50.0,
        },
    ),
    "Qwen3": (
        TEXT_ENCODER_FIELDS["Qwen3Model"],
        None,
        {
            "head_dim": 128,
            "attention_bias": False,
            "max_window_layers": 36,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "use_sliding_window": False,
        },
    ),
    "Mistral Small 3.1": (
        TEXT_ENCODER_FIELDS["Mistral3ForConditionalGeneration"],
        None,
        {
            "image_token_index": 10,
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu",
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
            "rope_theta": 1000000000.0,
        },
    ),
    "Qwen2.5-VL": (
        TEXT_ENCODER_FIELDS["Qwen2_5_VLForConditionalGeneration"],
        None,
        {
            "vision_token_id": 151654,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "rope_theta": 1000000.0,
            "vision_config": {"in_chans": 3, "spatial_patch_size": 14},
            "use_sliding_window": False,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_of_published_configs_are_known(name: str) -> None:
    fields, cls, config = PUBLISHED[name]
    check_fields(name, fields, config, {} if cls is None else constructor_defaults(cls))
