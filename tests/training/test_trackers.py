"""Experiment trackers of accelerate, by the one setting log.tracker."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from fdistill.base.errors import ConfigError
from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.config.sections import LogConfig
from fdistill.training.build import build
from fdistill.training.logbook import Logbook
from fdistill.training.trackers import check_tracker, start_tracker

NAMES = [name for name in get_args(LogConfig.model_fields["tracker"].annotation) if name != "none"]
OTHERS = [name for name in NAMES if name not in ("tensorboard", "wandb")]


class Noted(GeneralTracker):  # type: ignore[misc]
    """Notes what it is told."""

    name = "mlflow"
    requires_logging_directory = False
    told: list[Any]

    def __init__(self, run_name: str):
        super().__init__()
        self.told = Noted.told = [run_name]

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self.told.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append({name: values[name] for name in ("generator.lr", "ema.decays", "method")})

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.told.append((step, values["generator/matching"]))

    def finish(self) -> None:
        self.told.append("finish")


class Refusing(Noted):
    """Does not start, as where nobody has logged in."""

    def start(self) -> None:
        raise ValueError("no key\nwas found")


def tracked(name: str) -> DistillConfig:
    return load_config("digits", {"log.tracker": name})


@pytest.mark.parametrize("name", OTHERS)
def test_a_tracker_needs_a_name_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's own class is made as a run makes it, and started only by name: its package may not be here."""
    kind = LOGGER_TYPE_TO_CLASS[name]
    monkeypatch.setattr(kind, "start", lambda self: None)
    monkeypatch.setattr(kind, "store_init_configuration", lambda self, values: None)
    assert type(start_tracker(tracked(name), tmp_path, 0)) is kind


def test_a_run_tells_its_tracker_every_record(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mlflow", Noted)
    changes = {"teacher": str(tiny_teacher), "device": "cpu", "log.tracker": "mlflow", "log.samples_every": 0}
    run = build(load_config("digits", {**changes, "log.every": 2, "log.checkpoint_every": 0}), torch.device("cpu"))
    with Logbook(run, tmp_path, None, main=True) as logbook:
        for _ in range(4):
            run.iteration += 1
            value = {"generator/matching": run.iteration / 10}
            logbook.journal.record = lambda value=value: dict(value)  # type: ignore[method-assign]
            logbook.after_iteration([], stopping=False)
    settings = {"generator.lr": 4e-4, "ema.decays": "[]", "method": "f-distill"}
    assert Noted.told == ["fdistill", "start", settings, (2, 0.2), (4, 0.4), "finish"]
    Noted.told.clear()
    with Logbook(run, tmp_path, None, main=False):
        assert Noted.told == [], "the main process alone tells it"


def test_what_is_missing_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OTHERS:
        if importlib.util.find_spec(name) is None:
            with pytest.raises(ConfigError, match=rf"log.tracker: '{name}' needs `pip install {name}`"):
                check_tracker(name)
    check_tracker("none")
    check_tracker("tensorboard")
    monkeypatch.delitem(LOGGER_TYPE_TO_CLASS, "trackio")
    with pytest.raises(ConfigError, match="'trackio' needs `pip install -U accelerate`"):
        check_tracker("trackio")


def test_a_tracker_that_does_not_start_ends_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mlflow", Refusing)
    with pytest.raises(ConfigError, match=r"^log\.tracker: mlflow does not start: no key was found$"):
        start_tracker(tracked("mlflow"), tmp_path, 0)
