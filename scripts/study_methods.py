"""Distil the digits by every method and divergence at equal compute, and print a table of scores beside the teacher's.

    python scripts/study_methods.py OUTPUT_DIR [--seconds 60] [--seeds 0,1,2] [--jobs 2] [--only sid,kl] [KEY=VALUE ...]

Every row gets the iterations that fit into `--seconds` of training on one core, timed first, one row at a time. Then
each runs once a seed, in `--jobs` processes of one thread; samples are drawn with the run's seed. Runs that are there
already are not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

os.environ["OMP_NUM_THREADS"] = "1"

from evaluation.evaluate import evaluate
from fdistill.config.reading import load_config
from fdistill.divergence import ALIASES
from fdistill.methods import METHODS
from fdistill.students.folder import find_student
from fdistill.training.journal import read_records

METRICS = ("fd_digits", "precision", "recall", "class_accuracy")
QUIET = ["log.samples_every=0", "log.checkpoint_every=0", "log.tracker=none"]

_UNI = "digits-uni-instruct"
ROWS: dict[str, tuple[str, list[str]]] = {
    **{f"f-distill {alias}": ("digits", [f"divergence={alias}"]) for alias in ALIASES},
    **{name: (f"digits-{name}", []) for name in METHODS if name not in ("f-distill", "uni-instruct", "regression")},
    **{f"uni-instruct {alias}": (_UNI, [f"divergence={alias}"]) for alias in ("kl", "rkl", "jf", "js", "pearson")},
}
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "f-distill js": ("digits", []),
    "uni-instruct kl, weight detached": (_UNI, ["objective.detach_weight=true"]),
    "f-distill js, teacher samples for data": ("digits", ["data=teacher-samples"]),
    "f-distill js, 2 steps": ("digits", ["student_level=[2.5,0.6]"]),
    "dmd2, 2 steps": ("digits-dmd2", ["student_level=[2.5,0.6]"]),
}


def distil(row: str, iterations: int, output: Path, extra: list[str]) -> None:
    config, overrides = (VARIANTS | ROWS)[row]
    settings = [*overrides, f"iterations={iterations}", *QUIET, *extra]
    command = [sys.executable, "-m", "fdistill", "distill", config, *settings, "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def seconds_per_iteration(row: str, extra: list[str]) -> float:
    """Of the second half of a short run, alone on the machine."""
    with tempfile.TemporaryDirectory() as folder:
        distil(row, 16, Path(folder) / "run", [*extra, "log.every=8", "ratio.warmup=0"])
        first, second = read_records(Path(folder) / "run" / "metrics.jsonl")
    elapsed: float = second["seconds"] - first["seconds"]
    return elapsed / 8


def run_name(row: str, seed: int) -> str:
    return f"{row.replace(', ', '-').replace(' ', '-')}-{seed}"


def cell(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def table(scores: dict[str, list[dict[str, float]]], iterations: dict[str, int]) -> str:
    teacher = mean(score["fd_digits"] for score in scores["teacher"])
    lines = ["| | iterations | " + " | ".join(METRICS) + " | x teacher |", "|---" * (len(METRICS) + 3) + "|"]
    for row, of_row in scores.items():
        cells = [cell([score[metric] for score in of_row]) for metric in METRICS]
        ratio = mean(score["fd_digits"] for score in of_row) / teacher
        lines.append(f"| {row} | {iterations.get(row, '')} | {' | '.join(cells)} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="rows whose name contains one of these, as in sid,kl")
    parser.add_argument("--variants", action="store_true", help="data-free, few-step and detached variants instead")
    arguments = parser.parse_intermixed_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    known = VARIANTS if arguments.variants else ROWS
    rows = [row for row in known if not arguments.only or any(part in row for part in arguments.only.split(","))]
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    for row in rows:
        load_config(known[row][0], [*known[row][1], *arguments.overrides])  # a mistake shows before anything is timed

    plan = output / "iterations.json"
    iterations: dict[str, int] = json.loads(plan.read_text()) if plan.is_file() else {}
    for row in rows:
        if row not in iterations:
            iterations[row] = max(1, round(arguments.seconds / seconds_per_iteration(row, arguments.overrides)))
            print(f"{row}: {iterations[row]} iterations", flush=True)
            plan.write_text(json.dumps(iterations, indent=2) + "\n")

    def train(job: tuple[int, str]) -> None:
        seed, row = job
        folder = output / run_name(row, seed)
        if find_student(folder) is None:
            distil(row, iterations[row], folder, [f"seed={seed}", *arguments.overrides])
        if not (folder / "scores.json").is_file():
            command = [sys.executable, "-m", "fdistill", "evaluate", str(folder), "--seeds", str(seed)]
            subprocess.run([*command, "--output", str(folder / "scores.json")], check=True, capture_output=True)
            print(f"done: {folder.name}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(train, [(seed, row) for seed in seeds for row in rows]))
    scores = {"teacher": [evaluate("digits", seeds=[seed])["metrics"] for seed in seeds]}
    for row in rows:
        files = [output / run_name(row, seed) / "scores.json" for seed in seeds]
        scores[row] = [json.loads(file.read_text())["metrics"] for file in files]
    result = {"seconds": arguments.seconds, "seeds": seeds, "iterations": iterations, "scores": scores}
    (output / "scores.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(scores, iterations))


if __name__ == "__main__":
    main()
