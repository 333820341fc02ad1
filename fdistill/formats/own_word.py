"""What a single-file checkpoint says of itself: what its network predicts, and at which noise."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fdistill.base.errors import CheckpointError

#: Tensors without meaning as numbers, whose names are marks that ComfyUI reads and fine-tunes carry.
_PREDICTS_V, _ZERO_TERMINAL_SNR = "v_pred", "ztsnr"
#: Marks of networks under EDM's preconditioning: Playground v2.5 and CosXL.
_EDM = {
    "edm_mean": "EDM's network of Playground v2.5",
    "edm_vpred.sigma_max": "a CosXL network, which predicts v of EDM",
}
#: All of them: they are no part of a network, under whichever names its tensors are.
MARKS = frozenset({_PREDICTS_V, _ZERO_TERMINAL_SNR, *_EDM, "edm_std", "edm_vpred.sigma_min"})
#: A key of the file's metadata, as training scripts write it (github.com/Stability-AI/ModelSpec), and what it may say.
_SPEC = "modelspec.prediction_type"
_SPEC_TYPES = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}


def own_scheduler(names: Collection[str], metadata: Mapping[str, str], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the base's scheduler, changed to what a checkpoint says of itself.

    Args:
        names: of the file's tensors.
        metadata: of the safetensors file.
        scheduler: the base's scheduler_config.json.

    Raises:
        CheckpointError: the checkpoint contradicts itself, or is of another kind than a network of the base's
            scheduler can be.
    """
    edm = next((what for mark, what in _EDM.items() if mark in names), None)
    if edm is not None and not str(scheduler.get("_class_name")).startswith("EDM"):
        raise CheckpointError(
            f"says that it is {edm}, but teacher_base's scheduler is {scheduler.get('_class_name')}; expected the "
            "pipeline that the checkpoint was trained from"
        )
    said = _SPEC_TYPES.get(str(metadata.get(_SPEC)))
    if _PREDICTS_V in names:
        if said == "epsilon":
            raise CheckpointError(f"its tensor {_PREDICTS_V} says that it predicts v, and its {_SPEC} says epsilon")
        said = "v_prediction"
    changes: dict[str, Any] = {} if said is None else {"prediction_type": said}
    if _ZERO_TERMINAL_SNR in names:
        changes["rescale_betas_zero_snr"] = True
    if changes and "beta_schedule" not in scheduler:
        raise CheckpointError(
            f"says of itself {changes}, but teacher_base's scheduler {scheduler.get('_class_name')} has no such "
            "settings; expected the pipeline that the checkpoint was trained from"
        )
    made = {**scheduler, **changes}
    if changes.get("rescale_betas_zero_snr") and made.get("prediction_type", "epsilon") == "epsilon":
        raise CheckpointError(
            f"its tensor {_ZERO_TERMINAL_SNR} says that its noise ends without signal, but it predicts eps by its own "
            "word or that of teacher_base, which leaves x0 undefined there; expected a teacher_base that predicts v"
        )
    return made
