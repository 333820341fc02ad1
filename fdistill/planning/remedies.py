"""Which settings make a run fit a GPU: they are tried on the counted run, the fewest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from fdistill.base.errors import FDistillError
from fdistill.config.reading import validate
from fdistill.config.schema import DistillConfig
from fdistill.planning.counting import SECTIONS
from fdistill.planning.held import NAMES
from fdistill.planning.placement import STORED, Footprint, Placement, on_a_device

#: Settings that change what a step computes, each of which is counted anew. Adapters as docs/memory.md has them.
_LORA = {f"{role}.{key}": value for role in ("student", "fake_score") for key, value in {"lora_rank": 64}.items()}
RECOUNTED: dict[str, dict[str, Any]] = {
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "bf16": {"precision": "bf16", "frozen_precision": "bf16"},
    "LoRA": _LORA,
}
_MOST = 3  # settings that are combined


@dataclass(frozen=True)
class Remedy:
    """Settings, as a command takes them, and bytes on a GPU with them."""

    settings: tuple[str, ...]
    bytes: int


def remedies(
    config: DistillConfig,
    placed: Placement,
    memory: int,
    found: Footprint,
    count: Callable[[DistillConfig], Footprint],
) -> list[Remedy]:
    """Settings with which the run needs at most `memory` bytes on a GPU; without any that could be left out.

    Args:
        found: the run as it is counted without them.
        count: counts the run of another config.
    """
    fitting: dict[frozenset[str], Remedy] = {}
    for chosen in _subsets(_recounted(config), len(RECOUNTED)):
        changes = {key: value for name in chosen for key, value in RECOUNTED[name].items()}
        base = [f"{key}={_written(value)}" for key, value in changes.items()]
        if any(set(base) >= known for known in fitting):
            continue
        try:
            changed = _changed(config, changes) if changes else config
            counted = count(changed) if changes else found
        except FDistillError:  # this network or method cannot have it
            continue
        moved = replace(placed, frozen_precision=changed.frozen_precision)
        for settings, size in _placements(changed, counted, moved, memory):
            remedy = Remedy((*base, *settings), size)
            if not any(_kinds(remedy) > known for known in fitting):
                fitting[_kinds(remedy)] = remedy
    minimal = [remedy for kinds, remedy in fitting.items() if not any(kinds > other for other in fitting)]
    return sorted(minimal, key=lambda remedy: (len(remedy.settings), -remedy.bytes))


def _kinds(remedy: Remedy) -> frozenset[str]:
    """Its settings; parts of any size are one."""
    return frozenset(text.partition("=")[0] if "micro_batch" in text else text for text in remedy.settings)


def _recounted(config: DistillConfig) -> list[str]:
    """Those of RECOUNTED that the config does not have."""
    has = {
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": config.frozen_precision != "fp32",
        "LoRA": bool(config.student.lora_rank and config.fake_score.lora_rank),
    }
    return [name for name in RECOUNTED if not has[name]]


def _changed(config: DistillConfig, changes: Mapping[str, Any]) -> DistillConfig:
    values = config.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            values[section] = {**values[section], name: value}
        else:
            values[key] = value
    return validate(values)


def _placements(
    config: DistillConfig, found: Footprint, placed: Placement, memory: int
) -> Iterator[tuple[list[str], int]]:
    """Settings that need no new count, and bytes with them, where these fit."""
    options = _options(config, found, placed)
    for chosen in _subsets(list(options), _MOST):
        changes: dict[str, Any] = {}
        for name in chosen:
            if any(changes.get(key, value) != value for key, value in options[name].items()):
                break
            changes |= options[name]
        else:
            moved = replace(placed, **changes)
            for settings, scales in (([], {}), *_parts(found)):
                size = on_a_device(found, moved, scales, in_parts=bool(settings)).total
                if size <= memory:
                    yield [*(text for name in chosen for text in name.split()), *settings], size
                    break


def _options(config: DistillConfig, found: Footprint, placed: Placement) -> dict[str, dict[str, Any]]:
    """Setting -> the fields of `Placement` that it changes: those that this version and this config can have."""
    options: dict[str, dict[str, Any]] = {}
    if placed.gpus > 1 and placed.parallel == "ddp":
        options["parallel=fsdp"] = {"parallel": "fsdp"}
        if placed.gpus > placed.machine and not placed.gpus % placed.machine:
            options["parallel=hybrid"] = {"parallel": "hybrid"}
    if not placed.offload_frozen:
        options["offload_frozen=true"] = {"offload_frozen": True}
    if not placed.offload_optimizers:
        options["offload_optimizers=true"] = {"offload_optimizers": True}
    if placed.parallel != "ddp":  # which splits what is stored in few bits
        return options
    if config.frozen_precision == "bf16":
        for name in STORED:
            options[f"frozen_precision={name}"] = {"frozen_precision": name, "parallel": "ddp"}
    roles = [role for role in config.roles if NAMES[role] in found.moments_8bit]
    narrow = tuple(NAMES[role] for role in roles)
    if narrow != placed.moments_8bit:
        settings = " ".join(f"{role}.optimizer=adamw-8bit" for role in roles)
        options[settings] = {"moments_8bit": narrow, "parallel": "ddp"}
    return options


def _parts(found: Footprint) -> Iterator[tuple[list[str], dict[str, float]]]:
    """Smaller parts of both updates, the largest first: the settings, and the share of the counted samples."""
    samples = max(update.samples for update in found.updates.values())
    size = samples // 2
    while size:
        scales = {name: min(1.0, size / update.samples) for name, update in found.updates.items()}
        if not any(update.samples % min(size, update.samples) for update in found.updates.values()):
            sections = dict.fromkeys(SECTIONS[name] for name in found.updates)
            yield [f"{section}.micro_batch={size}" for section in sections], scales
        size //= 2


def _subsets(names: list[str], most: int) -> Iterator[tuple[str, ...]]:
    for count in range(min(most, len(names)) + 1):
        yield from combinations(names, count)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
