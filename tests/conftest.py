"""What every test has: its own cache, no downloads, kernels in the interpreter; and a tiny teacher."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Before anything imports Triton, which decides once for all whether its kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

from support.denoisers import tiny_unet


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained teacher of 20 k parameters as a pipeline folder, fast enough for whole runs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teachers") / "tiny"
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.75)
    ConsistencyModelPipeline(unet=tiny_unet(), scheduler=scheduler).save_pretrained(folder)
    return folder
