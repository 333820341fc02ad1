"""How near `fdistill generate` comes to the network's own speed, PNG files included; prints JSON.

    python scripts/bench_generate.py CHECKPOINT [--num-images 1792] [--batch-size 256] [--steps 18] [--precision bf16]
        [--compile] [--repeats 3] [--device auto] [--output FILE.json]
    python scripts/bench_generate.py edm-w32 --steps 1 --num-images 320 --batch-size 32

CHECKPOINT is what `fdistill generate` takes without prompts, or edm-w32 or edm-w128 with random weights. Images a
second are those that further batches add: the time of a command that draws one batch, with its start and what it
compiles, is subtracted. The network's own are those of its evaluations on noise that is there already. Both take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_step import machine, seconds
from bench_teachers import WORK
from torch import Tensor

from fdistill.adapters.blocks import compile_blocks
from fdistill.base.devices import autocast, start
from fdistill.base.files import atomic_file
from fdistill.denoiser import Denoiser
from fdistill.generation.generate import generate, open_maker
from fdistill.generation.network_maker import NetworkMaker
from fdistill.generation.sampling import Sampling
from fdistill.generator import Student

_WARM_UP = 2


def evaluated(checkpoint: str, arguments: argparse.Namespace, device: torch.device) -> tuple[Denoiser, int]:
    """The network, and how often an image needs it."""
    maker = open_maker(checkpoint, device, Sampling(num_steps=arguments.steps))
    if not isinstance(maker, NetworkMaker) or maker.takes_prompts:
        raise SystemExit(f"{checkpoint}: needs prompts; expected a model of classes, or of none")
    if arguments.compile:
        compile_blocks(maker.denoiser)
    if isinstance(maker.model, Student):
        return maker.denoiser, len(maker.model.levels)
    assert maker.num_steps is not None
    return maker.denoiser, 2 * maker.num_steps - 1


@torch.no_grad()
def forward_seconds(network: Denoiser, arguments: argparse.Namespace, device: torch.device) -> float:
    """Of one evaluation of a batch: the median of five."""
    count = arguments.batch_size
    x_t = torch.randn(count, *network.sample_shape, device=device)
    t = torch.full((count,), network.schedule.t_max, device=device)
    condition: Any = network.example_condition(count, device)

    def once() -> Tensor:
        with autocast(device, arguments.precision):
            found = network.denoise(x_t, t, condition)
        assert isinstance(found, Tensor)
        return found

    times = [seconds(once, device) for _ in range(_WARM_UP + 5)]
    return median(times[_WARM_UP:])


def generate_seconds(checkpoint: str, arguments: argparse.Namespace, count: int) -> float:
    """Of the whole command, until all files lie in their folder."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        generate(
            checkpoint,
            num_images=count,
            output=Path(folder) / "images",
            batch_size=arguments.batch_size,
            num_steps=arguments.steps,
            precision=arguments.precision,
            compiled=arguments.compile,
            device=arguments.device,
        )
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--num-images", type=int, default=1792, help="a multiple of the batch size, at least two of them"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, help="of a teacher")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    count, batch = arguments.num_images, arguments.batch_size
    if count % batch or count < 2 * batch:
        parser.error(f"--num-images: got {count}; expected two or more times the batch size of {batch}")
    sys.path.insert(0, str(Path(__file__).parent))  # of the teachers in WORK
    teachers = [text.removeprefix("teacher=") for text in WORK.get(arguments.checkpoint, []) if "teacher=" in text]
    checkpoint = teachers[0] if teachers else arguments.checkpoint
    device = start(arguments.device)[1]
    network, evaluations = evaluated(checkpoint, arguments, device)
    rounds = []
    for _ in range(arguments.repeats):
        own = batch / (evaluations * forward_seconds(network, arguments, device))
        added = generate_seconds(checkpoint, arguments, count) - generate_seconds(checkpoint, arguments, batch)
        rounds.append({"network": own, "generate": (count - batch) / added})
    found = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()},
        **machine(device),
        "evaluations_per_image": evaluations,
        "images_per_second": {name: median(each[name] for each in rounds) for name in ("network", "generate")},
        "share": median(each["generate"] / each["network"] for each in rounds),
        "rounds": rounds,
    }
    if arguments.output:
        with atomic_file(arguments.output) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
