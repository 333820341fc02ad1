"""Power-function averages: formulas against quadrature, running averages against the trajectory they average,
reconstruction against the average tracked directly, and whole runs with snapshots.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from fdistill import distill, load_student
from fdistill.base.errors import ArgumentError, CheckpointError, ConfigError, OutputError
from fdistill.commands.cli import app
from fdistill.commands.ema import reconstruct_student
from fdistill.config.reading import dump_config, load_config, validate
from fdistill.denoiser import Denoiser
from fdistill.ema import EMA
from fdistill.ema_profiles import (
    MAX_SIGMA_REL,
    MIN_SIGMA_REL,
    decay_at,
    gamma_from_sigma_rel,
    inner_product,
    posthoc_weights,
)
from fdistill.kernels.ema import ema as ema_kernel
from fdistill.student_kinds import STUDENT_FILE
from fdistill.training import loop
from fdistill.training.checkpoint import checkpoints
from fdistill.training.snapshots import find_snapshots
from support.denoisers import GaussianDenoiser
from support.families import edm_ncsnpp

Array = NDArray[np.float64]


def quadrature(t: float, points: int = 400) -> tuple[Array, Array]:
    """Nodes and weights on [0, t]: Gauss-Legendre's over (tau / t)^(1/5), in which broken powers of tau are smooth."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    root = (nodes + 1) / 2
    return t * root**5, t * 5 * root**4 * weights / 2


def profile(tau: Array, t: float, gamma: float) -> Array:
    return np.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0.0)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
@pytest.mark.parametrize("t", [1.0, 700.0])
def test_the_width_is_the_profile_s_standard_deviation(sigma_rel: float, t: float) -> None:
    gamma = gamma_from_sigma_rel(sigma_rel)
    tau, weight = quadrature(t)
    p = profile(tau, t, gamma) * weight
    mean = (p * tau).sum()
    assert p.sum() == pytest.approx(1)
    assert math.sqrt((p * (tau - mean) ** 2).sum()) / t == pytest.approx(sigma_rel, rel=1e-9)


def test_widths_at_the_ends_and_beyond_them() -> None:
    assert gamma_from_sigma_rel(MAX_SIGMA_REL) == pytest.approx(0, abs=1e-12)
    for sigma_rel in np.geomspace(MIN_SIGMA_REL, MAX_SIGMA_REL, 50)[:-1].tolist():
        gamma = gamma_from_sigma_rel(sigma_rel)
        assert math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) == pytest.approx(sigma_rel, rel=1e-12)
    for wrong in (0.0, -0.1, 0.289, math.nan, math.inf, 1e-200):
        with pytest.raises(ArgumentError, match=r"sigma_rel: expected 0\.0001 to 0\.2887"):
            gamma_from_sigma_rel(wrong)


@pytest.mark.parametrize("a", [(300.0, 16.97), (1000.0, 0.0)])
@pytest.mark.parametrize("b", [(300.0, 2.5), (999.0, 6.94), (1000.0, 16.97)])
def test_inner_products_against_quadrature(a: tuple[float, float], b: tuple[float, float]) -> None:
    tau, weight = quadrature(min(a[0], b[0]))
    expected = (profile(tau, *a) * profile(tau, *b) * weight).sum()
    assert inner_product(*a, *b) == pytest.approx(expected, rel=1e-9)
    assert inner_product(*b, *a) == pytest.approx(expected, rel=1e-9)


class Walk(nn.Module):
    """Weights whose trajectory is known: a start, and steps to the side."""

    def __init__(self, iterations: int, size: int, start: float = 5.0, dtype: torch.dtype = torch.float32):
        super().__init__()
        steps = torch.randn(iterations, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.trajectory = start + steps.cumsum(0) / math.sqrt(iterations)
        self.weight = nn.Parameter(torch.full((size,), 1e3, dtype=dtype))  # is to leave no trace

    def at(self, iteration: int) -> None:
        """The weights after an iteration, counted from 1."""
        self.weight.data.copy_(self.trajectory[iteration - 1])

    def averaged(self, t: int, gamma: float) -> torch.Tensor:
        """The integral over each iteration of a profile that ends at t, by quadrature, times its weights."""
        nodes, weights = np.polynomial.legendre.leggauss(40)
        tau = np.arange(t)[:, None] + (nodes + 1) / 2
        mass = (profile(tau, t, gamma) * weights / 2).sum(1)
        return torch.from_numpy(mass) @ self.trajectory[:t]


def test_the_running_average_is_the_profile_s_integral() -> None:
    walk = Walk(50, 7)
    ema = EMA(walk, [0.9], [0.05, 0.1, MAX_SIGMA_REL])
    for iteration in range(1, 51):
        walk.at(iteration)
        ema.update()
        if iteration == 1:
            for width in (0.05, 0.1, MAX_SIGMA_REL):
                assert torch.equal(ema.shadows[f"sigma_rel={width}"]["weight"], walk.weight)
        for width in (0.05, 0.1):
            expected = walk.averaged(iteration, gamma_from_sigma_rel(width))
            shadow = ema.shadows[f"sigma_rel={width}"]["weight"]
            torch.testing.assert_close(shadow.double(), expected, rtol=1e-6, atol=0)
    mean = ema.shadows[f"sigma_rel={MAX_SIGMA_REL}"]["weight"]
    torch.testing.assert_close(mean.double(), walk.trajectory.mean(0), rtol=1e-6, atol=0)
    gamma = gamma_from_sigma_rel(0.1)
    products = [
        (1 - decay_at(gamma, t)) * math.prod(decay_at(gamma, s) for s in range(t + 1, 51)) for t in range(1, 51)
    ]
    assert products == pytest.approx([(t / 50) ** (gamma + 1) - ((t - 1) / 50) ** (gamma + 1) for t in range(1, 51)])


def test_decays_beside_profiles_are_what_they_are_alone() -> None:
    walk = Walk(9, 5)
    alone, beside = EMA(walk, [0.5, 0.98]), EMA(walk, [0.5, 0.98], [0.1])
    for iteration in range(1, 10):
        walk.at(iteration)
        alone.update()
        beside.update()
    for decay in (0.5, 0.98):
        assert torch.equal(alone.shadows[decay]["weight"], beside.shadows[decay]["weight"])
    assert "updates" not in alone.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_kernels_copy_where_the_decay_is_0(backend: str, dtype: torch.dtype) -> None:
    """And take other decays in every launch on the same tensors."""
    if backend == "triton":
        pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    value = torch.randn(5001, device=device).to(dtype)
    shadows = [1e4 * torch.randn(5001, device=device) for _ in range(2)]
    other = shadows[1].clone()
    ema_kernel(shadows, [value], [0.0, 0.5], backend)
    assert torch.equal(shadows[0], value.float())
    torch.testing.assert_close(shadows[1], (other + value.float()) / 2)
    ema_kernel(shadows, [value], [1 / 3, 1.0], backend)
    torch.testing.assert_close(shadows[1], (other + value.float()) / 2)


def test_a_restored_average_goes_on_bit_by_bit() -> None:
    walk = Walk(20, 6)
    straight, first = EMA(walk, [0.9], [0.1]), EMA(walk, [0.9], [0.1])
    for iteration in range(1, 21):
        walk.at(iteration)
        straight.update()
        if iteration <= 10:
            first.update()
        if iteration == 10:
            second = EMA(walk, [0.9], [0.1])
            second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
        if iteration > 10:
            second.update()
    assert straight.state_dict().keys() == second.state_dict().keys()
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize(("wanted", "bound"), [(0.03, 0.05), (0.075, 0.003), (0.15, 0.004)])
def test_a_third_profile_from_snapshots_of_two(wanted: float, bound: float) -> None:
    """On a random walk, far from 0 as weights are. Measured: 0.029, 0.0016 and 0.0022 of what the nearest snapshot is
    off by; 0.084, 0.0079 and 0.037 where the sum of the coefficients is left to the fit.
    """
    iterations, every, stored = 480, 30, (0.05, 0.1)
    walk = Walk(iterations, 300, start=5.0)
    ema = EMA(walk, [], [*stored, wanted])
    snapshots = []
    for iteration in range(1, iterations + 1):
        walk.at(iteration)
        ema.update()
        if iteration % every == 0:
            snapshots += [(iteration, w, ema.shadows[f"sigma_rel={w}"]["weight"].double()) for w in stored]
    gamma = gamma_from_sigma_rel(wanted)
    weights = posthoc_weights(
        [t for t, _, _ in snapshots], [gamma_from_sigma_rel(w) for _, w, _ in snapshots], iterations, gamma
    )
    assert weights.dtype == np.float64
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    tracked = ema.shadows[f"sigma_rel={wanted}"]["weight"].double()
    made = sum(w * value for w, (_, _, value) in zip(weights.tolist(), snapshots, strict=True))
    nearest = min(float((value - tracked).norm()) for _, _, value in snapshots)
    assert float((made - tracked).norm()) < bound * nearest


def test_coefficients_are_the_nearest_combination() -> None:
    """Any other combination of sum 1 is further from the profile, in L2 by quadrature; a stored profile is itself."""
    t_in, gamma_in = [10.0, 20.0, 20.0, 30.0], [3.0, 3.0, 8.0, 8.0]
    weights = posthoc_weights(t_in, gamma_in, 30.0, 5.0)
    pieces = [(low + tau, weight) for low in (0.0, 10.0, 20.0) for tau, weight in [quadrature(10.0)]]
    tau, weight = np.concatenate([tau for tau, _ in pieces]), np.concatenate([weight for _, weight in pieces])
    basis = np.array([profile(tau, t, gamma) for t, gamma in zip(t_in, gamma_in, strict=True)])

    def distance(combination: Array) -> float:
        return float((weight * (combination @ basis - profile(tau, 30.0, 5.0)) ** 2).sum())

    for k in range(3):
        for change in (1e-3, -1e-3):
            assert distance(weights + change * (np.eye(4)[k] - np.eye(4)[3])) > distance(weights)
    np.testing.assert_allclose(posthoc_weights(t_in, gamma_in, 20.0, 8.0), [0, 0, 1, 0], atol=1e-9)
    np.testing.assert_allclose(posthoc_weights([7.0], [3.0], 9.0, 5.0), [1.0])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ema.sigma_rel=[0.3]", r"ema\.sigma_rel\.0: got 0\.3; expected at most 0\.288"),
        ("ema.sigma_rel=[0]", r"ema\.sigma_rel\.0: got 0; expected at least 0\.0001"),
        ("ema.export=sigma_rel=0.1", r"ema: export: got sigma_rel=0\.1, expected one of decays \[0\.98\]$"),
        ("ema.export=yes", r"export: got yes, expected one of decays"),
        ("ema.export=[0.98]", r"ema\.export: got \[0\.98\], expected one of decays, or one of sigma_rel"),
        (
            "ema.snapshot_every=5",
            r"snapshot_every: got 5, but snapshots store the averages of sigma_rel, which is empty",
        ),
        ("ema.snapshot_every=-1", "expected at least 0"),
        ("ema.decays=[]", r"expected one of decays \[\]"),
    ],
)
def test_settings_that_do_not_fit(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("digits", ["ema={decays: [0.98], sigma_rel: [], export: 0.98}", setting])


def test_settings_that_fit() -> None:
    config = load_config("digits", ["ema.sigma_rel=[0.05, 0.1]", "ema.decays=[]", "ema.export=sigma_rel=0.10"])
    assert config.ema.export == "sigma_rel=0.1"
    with pytest.raises(ConfigError, match=r"got 0\.9, expected one of decays \[\] or sigma_rel=0\.05, sigma_rel=0\.1"):
        validate({"ema": {"decays": [], "sigma_rel": [0.05, 0.1], "export": 0.9}})


SETTINGS = [
    "batch_size=8",
    "log.samples_every=0",
    "log.tracker=none",
    "log.checkpoint_every=3",
    "ema.sigma_rel=[0.05, 0.1]",
    "ema.export=sigma_rel=0.1",
    "ema.snapshot_every=2",
    "generator.lr=1e-3",
]


def snapshot_files(run: Path) -> list[str]:
    return [snapshot.path.name for snapshot in find_snapshots(run / "ema")]


def same_snapshots(one: Path, two: Path) -> bool:
    names = sorted(path.name for path in (one / "ema").iterdir())
    if names != sorted(path.name for path in (two / "ema").iterdir()):
        return False
    return all((one / "ema" / name).read_bytes() == (two / "ema" / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def finished(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("profiles") / "run"
    settings = [*SETTINGS, f"teacher={tiny_teacher}", "iterations=7", "log.keep_checkpoints=1"]
    distill(load_config("digits", settings), output=output)
    return output


def test_a_run_keeps_snapshots_and_exports_a_profile(finished: Path) -> None:
    assert snapshot_files(finished) == [f"{t:06d}-{width}.safetensors" for t in (2, 4, 6, 7) for width in (0.05, 0.1)]
    assert sorted(path.name for path in (finished / "ema").iterdir()) == snapshot_files(finished)
    state = load_file(checkpoints(finished / "checkpoints")[-1] / "state.safetensors")
    last = load_file(finished / "ema" / "000007-0.1.safetensors")
    student = load_student(finished).state_dict()
    assert last.keys() == student.keys()
    for name, value in last.items():
        assert torch.equal(value, student[name])
        assert torch.equal(value, state[f"ema.sigma_rel=0.1.{name}"])
    assert state["ema.updates"] == 7
    assert any(not torch.equal(value, state[f"ema.sigma_rel=0.05.{name}"]) for name, value in last.items())
    assert json.loads((finished / "student" / STUDENT_FILE).read_text())["ema"] == "sigma_rel=0.1"


def test_the_command_makes_the_combination(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "student"
    done = CliRunner().invoke(app, ["ema", str(finished), "--sigma-rel", "0.2", "--output", str(output)])
    assert done.exit_code == 0, done.exception
    assert f"student: {output}\n" in done.output
    used = [(t, width) for t in (2, 4, 6, 7) for width in (0.05, 0.1)]
    coefficients = posthoc_weights(
        [t for t, _ in used], [gamma_from_sigma_rel(width) for _, width in used], 7, gamma_from_sigma_rel(0.2)
    )
    stored = [load_file(finished / "ema" / f"{t:06d}-{width}.safetensors") for t, width in used]
    student = load_student(output)
    moved = 0.0
    for name, value in student.state_dict().items():
        expected = sum(c * tensors[name].double() for c, tensors in zip(coefficients.tolist(), stored, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        moved = max(moved, float((value - stored[-1][name]).abs().max()))
    assert moved > 1e-4
    facts = json.loads((output / STUDENT_FILE).read_text())
    original = json.loads((finished / "student" / STUDENT_FILE).read_text())
    del original["metrics"]  # measured with other weights
    assert facts == {**original, "ema": "sigma_rel=0.2", "ema_snapshots": 8, "files": facts["files"]}
    names = {str(path.relative_to(output)) for path in output.rglob("*")}
    assert names == {str(path.relative_to(finished / "student")) for path in (finished / "student").rglob("*")}
    for file in ("scheduler/scheduler_config.json", "model_index.json", "training_config.yaml"):
        assert (output / file).read_bytes() == (finished / "student" / file).read_bytes()


def test_an_earlier_iteration_uses_what_was_there(finished: Path, tmp_path: Path) -> None:
    reconstruct_student(finished, sigma_rel=0.05, iteration=4, output=tmp_path / "student")
    stored = load_file(finished / "ema" / "000004-0.05.safetensors")
    for name, value in load_student(tmp_path / "student").state_dict().items():
        torch.testing.assert_close(value, stored[name], rtol=1e-6, atol=1e-7)
    assert json.loads((tmp_path / "student" / STUDENT_FILE).read_text())["iterations"] == 4


def test_a_student_in_our_own_pipeline(tmp_path: Path) -> None:
    """Whose scheduler and levels come from the student's folder, not from the teacher's."""
    teacher = edm_ncsnpp(tmp_path / "teacher")
    settings = [*SETTINGS, f"teacher={teacher}", "iterations=1", "data=teacher-samples", "teacher_samples.count=8"]
    settings += ["teacher_samples.num_steps=1", "student_level=2.5", "discriminator.gan_weight=0"]
    settings += ["generator.gan_weight=0", "divergence=rkl", "ratio.warmup=0"]
    distill(load_config("digits", settings), output=tmp_path / "run")
    reconstruct_student(tmp_path / "run", sigma_rel=0.1, output=tmp_path / "student")
    one, two = load_student(tmp_path / "run"), load_student(tmp_path / "student")
    assert one.levels == two.levels
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value)
    for file in ("model_index.json", "network/config.json"):
        first, second = (json.loads((tmp_path / folder / file).read_text()) for folder in ("run/student", "student"))
        first.pop("_name_or_path", None)
        second.pop("_name_or_path", None)
        assert first == second


def own_network() -> Denoiser:
    return GaussianDenoiser(0.1, 0.3, size=8)


def test_a_student_of_a_network_of_one_s_own(tmp_path: Path) -> None:
    settings = [*SETTINGS, "teacher=test_ema_profiles:own_network", "iterations=2", "divergence=rkl"]
    settings += ["discriminator.gan_weight=0", "generator.gan_weight=0", "data=null", "student_level=2.5"]
    distill(load_config("digits", settings), output=tmp_path / "run")
    with pytest.raises(CheckpointError, match="network='module:function'"):
        reconstruct_student(tmp_path / "run", sigma_rel=0.1, output=tmp_path / "student")
    own = "test_ema_profiles:own_network"
    reconstruct_student(tmp_path / "run", sigma_rel=0.1, output=tmp_path / "student", network=own)
    one, two = load_student(tmp_path / "run", network=own), load_student(tmp_path / "student", network=own)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value)


def test_what_cannot_be_made(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "student"
    with pytest.raises(ArgumentError, match=r"iteration: got 9, .* \(4 from 2 to 7\); the nearest is 7"):
        reconstruct_student(finished, sigma_rel=0.1, iteration=9, output=output)
    with pytest.raises(ArgumentError, match="the nearest is 2"):
        reconstruct_student(finished, sigma_rel=0.1, iteration=1, output=output)
    for wrong in (0.0, 0.29):
        with pytest.raises(ArgumentError, match="sigma_rel: expected"):
            reconstruct_student(finished, sigma_rel=wrong, output=output)
    with pytest.raises(CheckpointError, match="no such folder"):
        reconstruct_student(tmp_path / "nowhere", sigma_rel=0.1, output=output)
    with pytest.raises(CheckpointError, match=r"no snapshots in .*ema\.snapshot_every=50"):
        reconstruct_student(finished / "student", sigma_rel=0.1, output=output)
    run = shutil.copytree(finished, tmp_path / "run")
    newest = run / "ema" / "000007-0.1.safetensors"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:2000])
    with pytest.raises(CheckpointError, match=r"000007-0\.1\.safetensors cannot be read"):
        reconstruct_student(run, sigma_rel=0.1, output=output)
    save_file({"other": torch.zeros(2)}, newest)
    with pytest.raises(CheckpointError, match=r"other tensors than in 000002-0\.05"):
        reconstruct_student(run, sigma_rel=0.1, output=output)
    newest.write_bytes(whole)
    assert not output.exists()
    output.mkdir()
    (output / "mine.txt").write_text("")
    with pytest.raises(OutputError, match="exists and is not an empty folder"):
        reconstruct_student(run, sigma_rel=0.1, output=output)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    shutil.rmtree(run / "student")
    with pytest.raises(CheckpointError, match="OUTPUT/student"):
        reconstruct_student(run, sigma_rel=0.1, output=tmp_path / "other")


@pytest.mark.thorough
def test_resuming_makes_later_snapshots_again(finished: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """Of a run that broke off after snapshots that no checkpoint knows; the others are not touched."""
    settings = [*SETTINGS, f"teacher={tiny_teacher}", "iterations=3", "log.keep_checkpoints=1"]
    output = tmp_path / "run"
    distill(load_config("digits", settings), output=output)
    later = load_config("digits", [*settings, "iterations=7"])
    (output / "ema" / "000003-0.05.safetensors").unlink()  # the end of the shorter run; the longer one has none there
    (output / "ema" / "000003-0.1.safetensors").unlink()
    for stale in ("000004-0.2.safetensors", "000005-0.1.safetensors", "000123-0.1.safetensors"):
        (output / "ema" / stale).write_bytes(b"from before the break")
    before = (output / "ema" / "000002-0.1.safetensors").stat().st_mtime_ns
    distill(later, output=output, resume=True)
    assert same_snapshots(output, finished)
    assert (output / "ema" / "000002-0.1.safetensors").stat().st_mtime_ns == before
    for name, value in load_student(finished).state_dict().items():
        assert torch.equal(value, load_student(output).state_dict()[name])


@pytest.mark.thorough
def test_killed_and_resumed_has_the_same_snapshots(
    finished: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*SETTINGS, f"teacher={tiny_teacher}", "iterations=7", "log.keep_checkpoints=1"]
    output, iterate = tmp_path / "run", loop.iterate

    def killed(state: Any, *arguments: Any) -> None:
        if state.iteration == 5:
            raise SystemExit
        iterate(state, *arguments)

    monkeypatch.setattr(loop, "iterate", killed)
    with pytest.raises(SystemExit):
        distill(load_config("digits", settings), output=output)
    monkeypatch.setattr(loop, "iterate", iterate)
    assert checkpoints(output / "checkpoints")
    config = load_config("digits", settings)
    distill(config, output=output, resume=True)
    assert same_snapshots(output, finished)
    assert dump_config(config) == (output / "config.yaml").read_text()
