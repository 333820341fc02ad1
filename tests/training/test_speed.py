"""`speed` changes how networks are run, and results by rounding alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from fdistill import distill
from fdistill.base import rng
from fdistill.base.errors import ConfigError
from fdistill.config.reading import load_config
from fdistill.config.sections import SpeedConfig
from fdistill.training import speed
from fdistill.training.build import build
from fdistill.training.checkpoint import checkpoints, load_checkpoint
from fdistill.training.speed import COMPILES, check_speed, follow_others

QUICK = {"batch_size": 8, "iterations": 4, "log.samples_every": 0, "log.tracker": "none", "ratio.warmup": 0}
#: Adam divides a gradient by its own size, and with a large eps only where it is more than rounding.
EPS = {f"{role}.eps": 1e-3 for role in ("generator", "fake_score", "discriminator")}


def trained(output: Path, teacher: Path, **settings: Any) -> dict[str, torch.Tensor]:
    distill("digits", output=output, teacher=str(teacher), **{**QUICK, **EPS, **settings})
    return load_checkpoint(checkpoints(output / "checkpoints")[-1])[0]


@pytest.fixture(scope="module")
def plain(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return trained(tmp_path_factory.mktemp("speed") / "plain", tiny_teacher, speed="off")


def compile_without_inductor(self: nn.Module, **options: Any) -> None:
    """Traces forward and backward as torch.compile does, and runs them without making code, which takes minutes."""
    self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager", **options)


compiles = pytest.mark.skipif(not COMPILES, reason="this torch's compiled blocks are refused")


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["speed.channels_last"],
        pytest.param(["speed.compile"], marks=[compiles, pytest.mark.thorough]),
        pytest.param(["speed.channels_last", "speed.compile"], marks=[compiles, pytest.mark.thorough]),
    ],
    ids=lambda settings: "+".join(settings) or "defaults",
)
def test_after_twelve_updates_weights_are_the_same(
    plain: dict[str, torch.Tensor],
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    settings: list[str],
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")  # with which no run would follow others; nor would it with one thread
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    monkeypatch.setattr(nn.Module, "compile", compile_without_inductor)
    counters.clear()
    quick = trained(tmp_path / "quick", tiny_teacher, **dict.fromkeys(settings, True))
    assert (counters["stats"]["unique_graphs"] > 0) == ("speed.compile" in settings)
    assert not counters["graph_break"]
    assert quick.keys() == plain.keys()
    for name, value in plain.items():
        if name.startswith(("generator.", "fake_score.", "discriminator.", "ema.")):
            torch.testing.assert_close(
                quick[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.thorough
def test_a_run_with_channels_last_goes_on_as_if_it_had_not_stopped(tiny_teacher: Path, tmp_path: Path) -> None:
    settings = {"speed.channels_last": True, "log.checkpoint_every": 2}
    whole = trained(tmp_path / "whole", tiny_teacher, **settings, iterations=4)
    trained(tmp_path / "parts", tiny_teacher, **settings, iterations=2)
    distill(
        "digits",
        output=tmp_path / "parts",
        resume=True,
        teacher=str(tiny_teacher),
        **{**QUICK, **EPS, **settings, "iterations": 4},
    )
    parts = load_checkpoint(checkpoints(tmp_path / "parts" / "checkpoints")[-1])[0]
    for name, value in whole.items():
        assert torch.equal(parts[name], value), name


def test_off_turns_off_what_a_config_turns_on(tmp_path: Path) -> None:
    (tmp_path / "fast.yaml").write_text("teacher: digits\nspeed: {channels_last: true, compile: true}\n")
    assert load_config(tmp_path / "fast.yaml").speed.compile
    for text in ("speed=off", "speed=false"):
        speed = load_config(tmp_path / "fast.yaml", [text]).speed
        assert speed == SpeedConfig(channels_last=False, compile=False, share_cores=False)
    for text in ("speed=on", "speed=true", "speed=0"):
        with pytest.raises(ConfigError, match="speed"):
            load_config("digits", [text])


def test_a_run_takes_free_cores_in_every_iteration_unless_compiled_or_told_otherwise(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[None] = []
    seen: list[bool] = []

    def shared(device: torch.device, *, compiled: bool) -> AbstractContextManager[Callable[[], None]]:
        seen.append(compiled)
        return nullcontext(lambda: followed.append(None))

    monkeypatch.setattr(speed, "shared_cores", shared)
    trained(tmp_path / "run", tiny_teacher, iterations=3)
    assert len(followed) == 3
    follow_others(load_config("digits", ["speed.compile=true"]), torch.device("cpu"))
    assert seen == [False, True]
    for settings in (["speed.share_cores=false"], ["speed=off"]):
        follow_others(load_config("digits", settings), torch.device("cpu"))
    monkeypatch.setattr(rng, "world", lambda: (0, 2))
    follow_others(load_config("digits"), torch.device("cpu"))
    assert seen == [False, True]


def test_all_networks_have_their_channels_last(tiny_teacher: Path) -> None:
    config = load_config("digits", [f"teacher={tiny_teacher}", "speed.channels_last=true"])
    run = build(config, torch.device("cpu"))
    for module in (run.networks.teacher, run.networks.fake_score, run.student, run.networks.discriminator):
        assert module is not None
        kernels = [value for value in module.parameters() if value.ndim == 4]
        assert all(value.is_contiguous(memory_format=torch.channels_last) for value in kernels)


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        (["speed.channels_last=true"], 2, "speed.channels_last: got true with several processes"),
        (
            ["speed.channels_last=true", "offload_frozen=true"],
            1,
            "speed.channels_last: got true with several processes",
        ),
        (["speed.channels_last=true", "offload_optimizers=true"], 1, "or offloaded weights"),
        (["speed.compile=true", "discriminator.r1_weight=1"], 1, "speed.compile: got true, but discriminator.r1=exact"),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: list[str], processes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "COMPILES", True)
    with pytest.raises(ConfigError, match=message):
        check_speed(load_config("digits", settings), processes)


def test_compiled_blocks_of_an_old_torch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "COMPILES", False)
    with pytest.raises(ConfigError, match=r"speed\.compile: got true with torch"):
        check_speed(load_config("digits", ["speed.compile=true"]), 1)
