"""What every test has: its own cache, no downloads, kernels in the interpreter; and a tiny teacher."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Runs are compared bit by bit, and otherwise take as many threads as there are free cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# Before anything imports Triton, which decides once for all whether its kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

from fdistill.training import logbook
from fdistill.training.curves import save_curves
from fdistill.training.sharding import make_mesh
from support.denoisers import tiny_unet

gc.disable()  # until all is imported: full collections would visit half a million objects that stay, again and again


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True, scope="session")
def _curves_once() -> Iterator[None]:
    """Draws the curves of the first run of each kind, and copies them to the others: half of a tiny run goes into them.

    Runs are of a kind if they log the same quantities, each of them above zero or not.
    """
    drawn: dict[frozenset[tuple[str, bool]], bytes] = {}

    def save(records: Sequence[dict[str, Any]], path: Path) -> None:
        kind = frozenset(
            (key, isinstance(v, (int, float)) and v > 0) for record in records for key, v in record.items()
        )
        if kind in drawn:
            path.write_bytes(drawn[kind])
        else:
            save_curves(records, path)
            if path.is_file():
                drawn[kind] = path.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logbook, "save_curves", save)
        yield


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained teacher of 20 k parameters as a pipeline folder, fast enough for whole runs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teachers") / "tiny"
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.75)
    ConsistencyModelPipeline(unet=tiny_unet(), scheduler=scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone, as offloading uses."""
    found = make_mesh("fsdp", torch.device("cpu"), offload=True)
    assert found is not None
    yield found
    dist.destroy_process_group()
