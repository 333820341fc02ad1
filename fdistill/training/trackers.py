"""Experiment trackers: those of accelerate that need nothing but a name, by the one setting log.tracker."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker, WandBTracker

from fdistill.base.errors import ConfigError, brief
from fdistill.config.nested import leaves
from fdistill.config.schema import DistillConfig

_PROJECT = "fdistill"


def check_tracker(name: str) -> None:
    """Raises ConfigError if a tracker's package is not installed, or this accelerate does not know it."""
    if name == "none":
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(
            f"log.tracker: {name!r} needs `pip install -U accelerate`; expected tensorboard or none without it"
        )
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"log.tracker: {name!r} needs `pip install {name}`; expected tensorboard or none without it")


def start_tracker(config: DistillConfig, folder: Path, iteration: int) -> GeneralTracker | None:
    """Starts the tracker of a run that goes on from an iteration; None for "none".

    It is told the run's settings, but for TensorBoard, which would show them as a run of their own.

    What a tracker writes on this machine is in the run's folder, where its class lets one choose.

    Raises:
        ConfigError: it does not start, as where nobody has logged in.
    """
    name = config.log.tracker
    if name == "none":
        return None
    tracker: GeneralTracker
    if name == "tensorboard":
        # Also of a run that starts anew, because it was killed before its first checkpoint.
        tracker = TensorBoardTracker("", folder / "tensorboard", purge_step=iteration + 1)
    elif name == "wandb":
        tracker = WandBTracker(_PROJECT, dir=str(folder))
    else:
        kind = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(_PROJECT, folder) if kind.requires_logging_directory else kind(_PROJECT)
    try:
        tracker.start()
        if name != "tensorboard":
            settings = leaves(config.model_dump(mode="json"))
            # Not every tracker takes lists.
            plain = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in settings}
            tracker.store_init_configuration(plain)
    except OSError:
        raise
    except Exception as error:  # other programs raise what they like
        raise ConfigError(f"log.tracker: {name} does not start: {brief(error)}") from error
    return tracker
