"""What a batch in parts changes where a density ratio weights samples: its bins and mean are then those of a part.

    python scripts/measure_parts.py [--output FILE.json] [--warmup N] [KEY=VALUE ...]

Trains the digits for some iterations, and then compares gradients of one update of the student, with the same
networks and draws: in parts against the whole batch, and against another draw of a whole batch.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdistill.base.files import atomic_file
from fdistill.config.reading import load_config
from fdistill.training.build import build
from fdistill.training.distillation import Distillation
from fdistill.training.inputs import training_data
from fdistill.training.loop import distill
from fdistill.training.parts import Split, backward
from fdistill.training.run_folder import resume_from

COUNTS = (2, 4, 8)
DRAWS = 6


def gradient(run: Distillation, labels: Tensor, seed: int, count: int, bins: Tensor) -> Tensor:
    """The student's gradient of one update, all parameters in a row."""
    run.ratio.bins = bins.clone()
    arguments = {"condition": labels, "batch_size": len(labels)}
    backward(run.student_update, arguments, torch.Generator().manual_seed(seed), Split(count, "fp32"))
    parameters = [p for p in run.student.parameters() if p.requires_grad]
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return found


def measured(divergence: str, warmup: int, settings: list[str]) -> dict[str, Any]:
    """Relative differences of gradients: means over some draws, and that of the mean gradient."""
    overrides = [*settings, f"divergence={divergence}", f"iterations={warmup}", "log.samples_every=0"]
    config = load_config("digits", [*overrides, "log.tracker=none", "device=cpu"])
    with tempfile.TemporaryDirectory() as folder:
        distill(config, output=Path(folder) / "run")
        run = build(config, torch.device("cpu"))
        resume_from(Path(folder) / "run", run)
    bins = run.ratio.bins.clone()
    with training_data(run).loader(config, run.networks.teacher, 0) as loader:
        batches = [next(loader).labels for _ in range(DRAWS)]
    made = {
        count: torch.stack([gradient(run, labels, seed, count, bins) for seed, labels in enumerate(batches)])
        for count in (1, *COUNTS)
    }
    whole = made[1]

    def difference(one: Tensor, two: Tensor) -> float:
        return round(float(((one - two).norm(dim=-1) / two.norm(dim=-1)).mean()), 4)

    found: dict[str, Any] = {f"{count} parts": difference(made[count], whole) for count in COUNTS}
    found["another batch"] = difference(whole.roll(1, 0), whole)
    return found | {f"mean of {count} parts": difference(made[count].mean(0), whole.mean(0)) for count in COUNTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--warmup", type=int, default=30, help="iterations before the comparison")
    parser.add_argument("settings", nargs="*", help="settings of the run")
    options = parser.parse_args()
    result = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        **{
            divergence: measured(divergence, options.warmup, options.settings)
            for divergence in ("jensen-shannon", "forward-kl")
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output is not None:
        with atomic_file(options.output) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
