"""Distil the digits with several divergences and seeds, and print a table of scores beside the teacher's.

    python scripts/study_divergences.py OUTPUT_DIR [--divergences js,rkl,kl] [--seeds 0,1,2] [KEY=VALUE ...]

Finished runs in OUTPUT_DIR are taken as they are, so the study can be stopped and started again.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from evaluation.evaluate import evaluate
from fdistill import distill, get_divergence, load_config
from fdistill.pipeline import is_student

METRICS = ("fd_digits", "precision", "recall", "class_accuracy")


def cell(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" +- {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--divergences", default="js,rkl,kl")
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_intermixed_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    names = [get_divergence(name).name for name in arguments.divergences.split(",")]

    rows = {"teacher": [evaluate("digits", seed=seed)["metrics"] for seed in seeds]}
    for name in names:
        rows[name] = []
        for seed in seeds:
            run = arguments.output / f"{name}-{seed}"
            if not is_student(run / "student"):
                config = load_config("digits", [f"divergence={name}", f"seed={seed}", *arguments.overrides])
                distill(config, output=run, resume=True)
            rows[name].append(evaluate(run, seed=seed)["metrics"])
    (arguments.output / "scores.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("| | " + " | ".join(METRICS) + " |\n" + "|---" * (len(METRICS) + 1) + "|")
    for name, scores in rows.items():
        print(f"| {name} | " + " | ".join(cell([score[metric] for score in scores]) for metric in METRICS) + " |")


if __name__ == "__main__":
    main()
