"""Seconds of one TiUE evaluation against K full evaluations of its UNet and against one, beside what their FLOPs
predict; prints JSON.

python scripts/bench_tiue.py [--levels 4] [--size 32] [--batch 1] [--rounds 15] [--device cpu] [--out FILE]

The UNet has the proportions of Stable Diffusion 1.5's at a fifth of its widths. All three are timed in turn, round by
round, and ratios are medians over the rounds: on a machine that others use as well, what slows one down slows its
neighbours in time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from fdistill.adapters import wrap
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.base.files import atomic_file
from fdistill.students.tiue import TiUEGenerator, leading_levels


def make_generator(levels: int, size: int, device: str) -> TiUEGenerator:
    """320, 640, 1280, 1280 channels become 64, 128, 256, 256; text 768 wide becomes 192."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(64, 128, 256, 256),
        cross_attention_dim=192,
        attention_head_dim=8,
    )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    denoiser = wrap(unet, scheduler_config(scheduler)).eval().requires_grad_(False).to(device)
    return TiUEGenerator(denoiser, leading_levels(denoiser.schedule, levels))


def flops(run: Callable[[], object]) -> int:
    """Of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def measure(levels: int, size: int, batch: int, rounds: int, device: str) -> dict[str, object]:
    generator = make_generator(levels, size, device)
    denoiser = generator.denoiser
    noise, text = torch.randn(batch, 4, size, size, device=device), denoiser.example_condition(batch, device)
    first = noise.new_full((batch,), generator.decoder_levels[0])

    def one() -> object:
        return denoiser.denoise(noise, first, text)

    def full() -> object:
        return [one() for _ in range(levels)]

    def tiue() -> object:
        return generator(noise, text)

    counted = {"tiue": flops(tiue), "full": flops(full), "one": flops(one)}  # also a warm-up
    times: dict[str, list[float]] = {"tiue": [], "full": [], "one": []}
    for _ in range(rounds):
        for name, run in (("tiue", tiue), ("full", full), ("one", one)):
            times[name].append(seconds(run, device))

    def ratio(other: str) -> dict[str, float]:
        values = [mine / theirs for mine, theirs in zip(times["tiue"], times[other], strict=True)]
        low, _, high = statistics.quantiles(values, n=4)
        median = statistics.median(values)
        predicted = counted["tiue"] / counted[other]
        return {key: round(value, 3) for key, value in zip(_RATIO, (predicted, median, low, high), strict=True)}

    return {
        "levels": levels,
        "latents": f"{batch} x 4 x {size} x {size}",
        "device": device,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "gflops": {name: round(value / 1e9, 2) for name, value in counted.items()},
        "median_seconds": {name: round(statistics.median(values), 4) for name, values in times.items()},
        f"tiue_over_{levels}_full_evaluations": ratio("full"),
        "tiue_over_one_full_evaluation": ratio("one"),
    }


_RATIO = ("predicted_from_flops", "measured", "lower_quartile", "upper_quartile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.levels, arguments.size, arguments.batch, arguments.rounds, arguments.device)
    text = json.dumps(result, indent=1)
    if arguments.out is not None:
        with atomic_file(arguments.out) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
