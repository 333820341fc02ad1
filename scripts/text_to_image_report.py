"""Print and draw what a run of digits-t2i reached. Exits with 1 where a target is missed.

python scripts/text_to_image_report.py RUN_DIR --seconds N
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from fdistill.base.files import atomic_file
from fdistill.data.digit_captions import DIGIT_WORDS, WEIGHT_WORDS
from fdistill.generation.generate import open_maker
from fdistill.generation.maker import Maker
from fdistill.generation.sampling import Sampling

ACCURACY, SECONDS, COPIES = 0.9, 600, 4
METRICS = ("prompt_accuracy", "ink_bold", "ink_thin", "fd_digits")


def draw(makers: dict[str, Maker], path: Path) -> None:
    """Bold and thin digits of every kind, each maker's beside the other's, for the same noise."""
    prompts = [f"a {weight} handwritten {word}" for word in DIGIT_WORDS for weight in reversed(WEIGHT_WORDS)]
    figure, axes = plt.subplots(len(prompts) // 2, 2, figsize=(9, 7), layout="constrained")
    images = {
        name: maker.sample(
            0, range(len(prompts) * COPIES), [p for p in prompts for _ in range(COPIES)], torch.device("cpu")
        )
        for name, maker in makers.items()
    }
    for i, (axis, prompt) in enumerate(zip(axes.flat, prompts, strict=True)):
        rows = slice(i * COPIES, (i + 1) * COPIES)
        gap = torch.full((3, 16, 6), 255, dtype=torch.uint8)
        strip = torch.cat([*images["teacher"][rows], gap, *images["student"][rows]], dim=2)
        axis.imshow(strip.permute(1, 2, 0), interpolation="nearest")
        axis.set_title(prompt, fontsize=8, pad=2)
        axis.axis("off")
    figure.suptitle("teacher, guidance 2, 70 evaluations (left) and student, one evaluation (right)", fontsize=10)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=int, required=True, help="how long the distillation took")
    arguments = parser.parse_args()
    run: Path = arguments.run
    names = {"teacher-1": "teacher, 1", "teacher-2": "teacher, 2", "student": "student"}
    scores: dict[str, dict[str, Any]] = {
        name: json.loads((run / "scores" / f"{name}.json").read_text()) for name in names
    }
    cpu = torch.device("cpu")
    draw(
        {"teacher": open_maker("digits-t2i", cpu, Sampling(guidance_scale=2.0)), "student": open_maker(run, cpu)},
        run / "comparison.png",
    )
    with atomic_file(run / "report.json") as temporary:
        temporary.write_text(json.dumps({"seconds": arguments.seconds, **scores}, indent=2) + "\n")

    print(f"{'':24}" + "".join(f"{name:>14}" for name in names.values()))
    nfe = "".join(f"{scores[name]['provenance']['evaluations_per_image']:>14g}" for name in names)
    print(f"{'evaluations an image':24}{nfe}")
    for metric in METRICS:
        print(f"{metric:24}" + "".join(f"{scores[name]['metrics'][metric]:>14.3f}" for name in names))
    student = scores["student"]["metrics"]
    checks = [
        (f"the digit asked for in at least {ACCURACY:.0%}", student["prompt_accuracy"] >= ACCURACY),
        ("bold has more ink than thin", student["ink_bold"] > student["ink_thin"]),
        (f"distilled in under {SECONDS // 60} minutes: {arguments.seconds} s", arguments.seconds < SECONDS),
    ]
    print()
    for what, reached in checks:
        print(f"{'reached' if reached else 'MISSED '}  {what}")
    return 0 if all(reached for _, reached in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
