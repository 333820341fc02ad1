"""Whether a draft fits the memory of its GPUs, and the settings that make it fit: what `fdistill plan` counts."""

from __future__ import annotations

from collections.abc import Callable

from fdistill.base.errors import FDistillError
from fdistill.commands.init.answers import Hardware
from fdistill.commands.init.draft import Draft
from fdistill.config.plain_yaml import parse_yaml
from fdistill.planning.plan import Hardware as Planned
from fdistill.planning.plan import make_plan
from fdistill.planning.rates import Rates
from fdistill.planning.remedies import Remedy

_MACHINE = 8  # GPUs
_RATES = Rates(150.0, 450.0, 50.0)  # times are not read here
#: Setting, or its name alone -> (how little it is liked, why it is chosen).
_REMEDIES: dict[str, tuple[float, str]] = {
    "gradient_checkpointing": (1, "it makes the run fit: activations are computed again, for 20 to 33 % more time"),
    "micro_batch": (
        0.5,
        "it makes the run fit: an update is computed in parts of so many samples, with the same result",
    ),
    "precision": (1, "it makes the run fit: networks compute in bf16, with half the memory"),
    "frozen_precision=bf16": (1, "it makes the run fit: weights that are not trained need no more precision"),
    "parallel": (2, "it makes the run fit: the GPUs divide the weights among them"),
    "lora_rank": (4, "it makes the run fit: adapters are trained on the teacher's weights, not all weights"),
    "optimizer": (3, "it makes the run fit: moments in 8 bits, for which you need `pip install 'fdistill[quantised]'`"),
    "offload_optimizers": (8, "it makes the run fit: the CPU's memory holds what is trained, which is slower"),
    "offload_frozen": (8, "it makes the run fit: the CPU's memory holds the teacher, which is slower"),
    "frozen_precision=int8": (
        6,
        "it makes the run fit: the teacher in 8 bits, for which you need `pip install 'fdistill[quantised]'`",
    ),
    "frozen_precision=fp8": (
        20,
        "it makes the run fit: the teacher in 8 bits, for which you need `pip install 'fdistill[quantised]'`",
    ),
    "frozen_precision=nf4": (
        12,
        "it makes the run fit: the teacher in 4 bits, for which you need `pip install 'fdistill[quantised]'`",
    ),
}


def fit(draft: Draft, hardware: Hardware, say: Callable[[str], None]) -> None:
    """Counts the memory of a draft's run and adds the settings that make it fit, the least costly ones that do. Where
    it cannot be counted the draft stays as it is, and its sentence about memory says why.

    Raises:
        ConfigError: the draft's settings do not go together.
    """
    if not hardware.gpus:
        draft.memory = "A run on a CPU is not limited to a GPU's memory, so it was not counted."
        return
    config = draft.config()
    try:
        planned = make_plan(config, Planned(hardware.gpus, _MACHINE, hardware.bytes, _RATES), say)
    except FDistillError as error:
        reason = " ".join(str(error).split())
        draft.memory = f"It could not be counted ({reason}), so what concerns memory is the recipe's."
        return
    size, room = (
        planned.device.total,
        f"of the {hardware.gigabytes:g} GB of {'each' if hardware.gpus > 1 else 'the'} GPU",
    )
    if planned.remedies is None:
        draft.memory = f"An iteration needs {_gigabytes(size)} {room} at its peak (counted, not measured)."
    elif not planned.remedies:
        draft.memory = (
            f"IT DOES NOT FIT: an iteration needs {_gigabytes(size)} {room} at its peak, and no setting that was tried "
            "brings it below. Use a GPU with more memory, or more of them."
        )
    else:
        chosen = min(planned.remedies, key=_cost)
        _apply(draft, chosen)
        draft.memory = (
            f"An iteration needs {_gigabytes(chosen.bytes)} {room} at its peak (counted, not measured); without the "
            f"settings that say so below, {_gigabytes(size)}."
        )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e9:.4f} GB"


def _known(setting: str) -> tuple[float, str]:
    name = setting.partition("=")[0].rpartition(".")[2]
    return _REMEDIES.get(setting) or _REMEDIES[name]


def _cost(remedy: Remedy) -> tuple[float, int]:
    """What a remedy costs; of equal ones the one that leaves the GPU fuller is the smaller change."""
    return sum(_known(setting)[0] for setting in remedy.settings), -remedy.bytes


def _apply(draft: Draft, remedy: Remedy) -> None:
    for setting in remedy.settings:
        key, _, value = setting.partition("=")
        why = _known(setting)[1]
        draft.put(key, parse_yaml(value, setting), f"{why[0].upper()}{why[1:]}.")
    if "student.lora_rank=64" in remedy.settings:
        why = "Adapters need a higher rate than whole weights; this is the recipes' for 24 GB."
        draft.put("generator.lr", 5e-5, why)
        draft.put("fake_score.lr", 1e-4, why)
