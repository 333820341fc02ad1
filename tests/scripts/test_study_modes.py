"""The study of mode coverage: its teacher is exact, and its command runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

pytestmark = pytest.mark.thorough  # what is tried here takes a minute

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "study_modes.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_modes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["grid", "ring"])
@pytest.mark.parametrize("sigma", [0.02, 0.3, 1.0])
def test_teacher_is_tweedies_formula_of_the_mixture(study: ModuleType, name: str, sigma: float) -> None:
    """D = x + sigma^2 score, the score by autograd of the log density that torch.distributions writes."""
    teacher = study.mixtures()[name].double()
    x = (1.5 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_(True)
    spread = torch.full_like(teacher.means, (teacher.std**2 + sigma**2) ** 0.5)
    noised = MixtureSameFamily(Categorical(teacher.weights), Independent(Normal(teacher.means, spread), 1))
    (score,) = torch.autograd.grad(noised.log_prob(x).sum(), x)
    prediction = teacher(x.detach().reshape(-1, 2, 1, 1), torch.full((64,), sigma, dtype=torch.float64))
    torch.testing.assert_close(prediction.flatten(1), x.detach() + sigma**2 * score, rtol=1e-6, atol=1e-9)


def test_scores_of_exact_samples_and_of_one_lost_mode(study: ModuleType) -> None:
    teacher = study.mixtures()["ring"]
    x0 = teacher.sample(torch.Generator().manual_seed(0), 20_000)
    exact = study.score(x0, teacher)
    assert exact["modes_found"] == 8
    assert exact["weight_error"] < 0.02
    assert exact["precision"] == pytest.approx(0.989, abs=0.005)  # 1 - exp(-9 / 2)
    first = torch.cdist(x0.flatten(1), teacher.means).argmin(1) == 0
    lost = study.score(x0[~first], teacher)
    assert lost["modes_found"] == 7
    assert lost["weight_error"] == pytest.approx(teacher.weights[0].item(), abs=0.01)


def test_short_study_writes_numbers_and_picture(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, tmp_path, "--seeds", "0", "--iterations", "20", "--divergences", "rkl,kl"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads((tmp_path / "modes.json").read_text())["runs"]
    assert [(run["mixture"], run["divergence"]) for run in runs] == [
        (mixture, name) for name in ("exact", "reverse-kl", "forward-kl") for mixture in ("grid", "ring")
    ]
    assert (tmp_path / "modes.png").read_bytes().startswith(b"\x89PNG")
    assert "| grid | forward-kl |" in done.stdout
