"""adapter_config.json, in which peft says what the tensors of a LoRA that it saved mean."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fdistill.adapters.config_fields import Fields, check_fields, names, refusals
from fdistill.base.errors import CheckpointError
from fdistill.base.files import read_json_object

#: As peft names its weights, and the config beside them.
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_OTHER = "only plain low-rank updates can be merged: merge it with peft and save the pipeline"
#: Fields of `LoraConfig`. Which layers have adapters is seen from the tensors.
PEFT_FIELDS = Fields(
    names("r lora_alpha rank_pattern alpha_pattern use_rslora"),
    names(
        "task_type auto_mapping base_model_name_or_path revision inference_mode peft_version lora_dropout "
        "target_modules exclude_modules layers_to_transform layers_pattern loftq_config eva_config corda_config "
        "lora_ga_config qalora_group_size megatron_core runtime_config ensure_weight_tying"
    ),
    {
        **refusals("peft_type", _OTHER, "LORA"),
        **refusals("use_dora", "a DoRA cannot be merged; merge it with peft and save the pipeline", False),
        **refusals("bias", _OTHER, "none"),
        # The others change the weights that the update is added to.
        **refusals("init_lora_weights", _OTHER, True, False, "gaussian", "orthogonal", "eva"),
        **refusals("fan_in_fan_out lora_bias use_qalora use_bdlora", _OTHER, False, None),
        **refusals(
            "modules_to_save layer_replication alora_invocation_tokens trainable_token_indices target_parameters "
            "megatron_config arrow_config velora_config monteclora_config kasa_config",
            _OTHER,
            None,
            [],
        ),
    },
)


def lora_files(path: Path) -> list[Path]:
    """The file of a LoRA's tensors, and peft's config if the tensors are in a file of peft's.

    Args:
        path: a LoRA file, or the folder that peft or diffusers saved it to.

    Raises:
        CheckpointError: a folder holds no LoRA, or several; or peft's config is missing.
    """
    if path.is_dir():
        found = sorted(file for file in path.glob("*.safetensors"))
        named = [file for file in found if file.name == PEFT_WEIGHTS]
        if len(named or found) != 1:
            listed = ", ".join(file.name for file in found) or "none"
            raise CheckpointError(f"{path}: holds the safetensors {listed}; name the file of the LoRA")
        path = (named or found)[0]
    config = path.with_name(PEFT_CONFIG)
    if path.name != PEFT_WEIGHTS:
        return [path]
    if not config.is_file():
        raise CheckpointError(
            f"{path}: peft's {PEFT_CONFIG}, which says how strong the LoRA is, is not beside it; copy it there"
        )
    return [path, config]


def read_peft_config(path: Path) -> dict[str, Any]:
    """The settings of a LoRA.

    Raises:
        CheckpointError: the file cannot be read, or is of more than a plain low-rank update.
    """
    try:
        config = read_json_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from error
    check_settings(str(path), config)
    return config


def check_settings(what: str, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for the settings of more than a plain low-rank update; `what` is whose they are."""
    check_fields(what, PEFT_FIELDS, config, _defaults())
    numbers = [config.get("r", 8), config.get("lora_alpha", 8), *dict(config.get("alpha_pattern") or {}).values()]
    if not all(isinstance(value, (int, float)) for value in numbers):
        raise CheckpointError(f"{what}: r, lora_alpha and alpha_pattern are {numbers}; expected numbers")


def _defaults() -> Mapping[str, Any]:
    """Of the installed peft; it is not needed for merging."""
    if importlib.util.find_spec("peft") is None:
        return {}
    from peft import LoraConfig

    return {
        field.name: field.default if field.default is not dataclasses.MISSING else None
        for field in dataclasses.fields(LoraConfig)
    }
