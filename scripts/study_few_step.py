"""Students of 1, 2, 4 and 8 steps of the embedded text-to-image teacher: four methods, all weights or a LoRA.

    python scripts/study_few_step.py OUTPUT_DIR [--only 'f-distill-4,dmd2-*'] [--jobs 2] [KEY=VALUE ...]
    python scripts/study_few_step.py OUTPUT_DIR --only '*+*'          # the terms alone

A row is METHOD-STEPS or METHOD-STEPS-lora; METHOD-STEPS+TERM adds one of the terms of docs/few-step.md. Runs have one
thread each, `--jobs` at a time; runs and scores that are there already are kept. The table has prompt accuracy,
fd_digits also as a multiple of the guided teacher's, and the diversity within a prompt, all as means over five draws of
noise; the milliseconds that an image takes; and the minutes of training.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from evaluation.evaluate import evaluate
from fdistill.base.files import atomic_file

STEPS, DRAWS, GUIDANCE = (1, 2, 4, 8), (0, 1, 2, 3, 4), 2.0
METRICS = ("prompt_accuracy", "fd_digits", "diversity_digits")

_COMMON: dict[str, Any] = {
    "teacher": "digits-t2i",
    "guidance_scale": GUIDANCE,
    "data": "digit-captions",
    "iterations": 300,
    "batch_size": 32,
    "critic_steps": 2,
    "generator": {"lr": 2e-4, "lr_schedule": "cosine"},
    "fake_score": {"lr": 2e-4, "weighting": "min-snr"},
    "matching_levels": {"sampler": "uniform", "low": 0.02, "high": 0.98},
    "critic_levels": {"sampler": "uniform"},
    "ema": {"decays": [0.95], "export": 0.95},
    "log": {"every": 10, "samples_every": 100, "checkpoint_every": 0, "tracker": "none"},
}
_HEAD = {"source": "fake", "features": ["mid"], "gan_weight": 1e-2}
_BALANCED = {"generator": {"gan_gradient_ratio": 0.3}, "discriminator": _HEAD}
METHODS: dict[str, dict[str, Any]] = {
    "f-distill": {"divergence": "jensen-shannon", **_BALANCED},
    "dmd2": _BALANCED,
    "decoupled-dmd": {**_BALANCED, "augmentation": {"weight": 1.0, "sampler": "uniform"}},
    "sid": {},
}
#: Adapters of rank 32 on student and fake score. The student's rate is ten times as high, as is usual for them. The
#: fake score's is five times as high, since it exploded at ten in most rows.
_LORA: dict[str, Any] = {
    "student": {"lora_rank": 32},
    "generator": {"lr": 2e-3},
    "fake_score": {"lora_rank": 32, "lr": 1e-3},
}


#: Terms and ways of training, each by itself in a run of DMD2's four steps.
TERMS: dict[str, dict[str, Any]] = {
    "noised-data": {"student": {"simulated": 0}},
    "deterministic": {"student": {"sampler": "deterministic"}},
    "any-step": {"student": {"any_step": True}},
    "alignment": {"fake_score": {"alignment": 0.02}},
    "segment": {"segment": {"weight": 0.5}},
    "diversity": {"diversity": {"weight": 0.05}},
    "floor": {"generator": {"normaliser_floor": 0.1}},
    "warm-up": {
        "regression": {"pairs": 1000},
        "iterations": 350,
        "stages": [{"iterations": 50, "method": "regression"}, {"iterations": 300}],
    },
    "phases": {"student": {"phases": 2}},
}
ROWS = (
    *(f"{method}-{steps}{kind}" for kind in ("", "-lora") for method in METHODS for steps in STEPS),
    *(f"dmd2-4{'-lora' if term == 'phases' else ''}+{term}" for term in TERMS),
    *(f"{name}+deterministic" for name in ("f-distill-4", "dmd2-4-lora")),
)


def config(row: str) -> dict[str, Any]:
    """The settings of a row."""
    name, _, term = row.partition("+")
    method, _, steps = name.removesuffix("-lora").rpartition("-")
    made: dict[str, Any] = {"method": method}
    of_steps = {"student": {"steps": int(steps)}} if int(steps) > 1 else {"student_level": 999.0}
    lora = _LORA if name.endswith("-lora") else {}
    for part in (_COMMON, METHODS[method], of_steps, lora, TERMS[term] if term else {}):
        for key, value in part.items():
            made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
    return made


def distil(output: Path, row: str, overrides: list[str]) -> Path:
    """One run, or one for each phase; the last one's folder. The minutes it took are in minutes.json."""
    folder = output / row
    if (folder / "minutes.json").is_file():
        return folder
    settings = config(row)
    path = output / f"{row}.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "fdistill", "distill", str(path), *overrides]
    started = time.monotonic()
    before: list[str] = []
    shutil.rmtree(folder, ignore_errors=True)  # a run that was interrupted
    for phase in range(1, settings.get("student", {}).get("phases", 1)):
        earlier = output / f"{row}-{phase}"
        shutil.rmtree(earlier, ignore_errors=True)
        _run([*command, *before, "--output", str(earlier)])
        before = [f"student.previous_phase={earlier}"]
    _run([*command, *before, "--output", str(folder)])
    (folder / "minutes.json").write_text(json.dumps((time.monotonic() - started) / 60))
    print(f"done: {row}", flush=True)
    return folder


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{done.stderr[-3000:]}")


def scores(samples: str, kept: Path, **options: Any) -> dict[str, Any]:
    """Means and spreads over draws of noise, and milliseconds an image; from the file `kept` if it is there."""
    if kept.is_file():
        before: dict[str, Any] = json.loads(kept.read_text())
        return before
    found = evaluate(samples=samples, protocol="digits-t2i", metrics=list(METRICS), seeds=DRAWS, **options)
    values = {name: [draw[name] for draw in found["seeds"].values()] for name in METRICS}
    result = {
        **{name: mean(each) for name, each in values.items()},
        **{f"{name}_spread": stdev(each) for name, each in values.items()},
        "milliseconds": 1e3 * found["provenance"]["seconds_per_image"],
    }
    with atomic_file(kept) as temporary:
        temporary.write_text(json.dumps(result))
    return result


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of the table in docs/few-step.md."""
    head = ["row", "prompt accuracy", "fd_digits", "times the teacher's", "diversity", "ms an image", "minutes"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, each in found.items():
        times = each["fd_digits"] / found["teacher"]["fd_digits"]
        cells = [f"{each['prompt_accuracy']:.3f}", f"{each['fd_digits']:.2f} ± {each['fd_digits_spread']:.2f}"]
        cells += [f"{times:.2f}", f"{each['diversity_digits']:.2f}", f"{each['milliseconds']:.1f}"]
        minutes = f"{each['minutes']:.1f}" if "minutes" in each else ""
        lines.append(f"| `{row}` | {' | '.join(cells)} | {minutes} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--only", default="*", help="rows whose name fits one of these, with commas between them")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_intermixed_args()  # KEY=VALUE after the options as well
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    rows = [row for row in ROWS if any(fnmatch(row, pattern) for pattern in arguments.only.split(","))]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folders = list(pool.map(lambda row: distil(output, row, arguments.overrides), rows))
    found = {"teacher": scores("digits-t2i", output / "teacher.json", guidance_scale=GUIDANCE)}
    for row, folder in zip(rows, folders, strict=True):
        minutes = json.loads((folder / "minutes.json").read_text())
        found[row] = {**scores(str(folder), folder / "scores.json"), "minutes": minutes}
        if row.endswith("+any-step"):
            for steps in (1, 2):
                fewer = scores(str(folder), folder / f"scores-{steps}.json", num_steps=steps)
                found[f"{row}, {steps} of its steps"] = {**fewer, "minutes": minutes}
    with atomic_file(output / "few-step.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
