"""Print and draw what a quickstart run reached: teacher and student side by side. Exits with 1 where a target is
missed.

python scripts/quickstart_report.py RUN_DIR [--seconds N]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from evaluation.images import open_images
from fdistill.base.files import atomic_file
from fdistill.base.images import save_grid, save_side_by_side
from fdistill.config.reading import load_config

#: Multiple of the teacher's fd_digits a student may have; the default divergence is held to more.
FD_RATIO = {"jensen-shannon": 1.6}
OTHER_FD_RATIO, ACCURACY, SECONDS = 2.5, 0.97, 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=int, help="how long distil, generate and evaluate took together")
    arguments = parser.parse_args()
    run: Path = arguments.run

    scores: dict[str, dict[str, Any]] = {}
    for who in ("teacher", "student"):
        scores[who] = json.loads((run / "scores" / f"{who}.json").read_text())
        save_grid(open_images(run / "images" / who, channels=1).read(range(100)), run / f"{who}.png")
    divergence = json.loads((run / "student" / "fdistill_student.json").read_text())["divergence"]
    teacher, student = (scores[who]["metrics"] for who in ("teacher", "student"))
    nfe = {who: scores[who]["provenance"]["evaluations_per_image"] for who in scores}
    speed = {who: scores[who]["provenance"]["images_per_second"] for who in scores}
    panels = []
    for who, result in scores.items():
        evaluations = f"{nfe[who]:g} evaluation{'' if nfe[who] == 1 else 's'}"
        panels.append(
            (f"{who}: {evaluations} an image, fd_digits {result['metrics']['fd_digits']:.2f}", run / f"{who}.png")
        )
    save_side_by_side(panels, run / "comparison.png")

    print(f"{'':24}{'teacher':>12}{'student':>12}")
    print(f"{'evaluations an image':24}{nfe['teacher']:>12g}{nfe['student']:>12g}")
    print(f"{'images/s':24}{speed['teacher']:>12.0f}{speed['student']:>12.0f}")
    for name in teacher:
        print(f"{name:24}{teacher[name]:>12.3f}{student[name]:>12.3f}")

    allowed = FD_RATIO.get(divergence, OTHER_FD_RATIO)
    ratio = student["fd_digits"] / teacher["fd_digits"]
    checks = [
        (
            f"fd_digits of the student at most {allowed}x the teacher's ({divergence})",
            f"{ratio:.2f}x",
            ratio <= allowed,
        ),
        (
            f"class accuracy at least {ACCURACY}",
            f"{student['class_accuracy']:.3f}",
            student["class_accuracy"] >= ACCURACY,
        ),
        ("one evaluation an image", f"{nfe['student']:g}", nfe["student"] == 1),
    ]
    failed = not all(good for _, _, good in checks)
    if arguments.seconds is not None:  # told, but a slow or busy machine is no failure
        took = f"{arguments.seconds // 60} min {arguments.seconds % 60:02d} s"
        checks.append(
            (f"distil, generate and evaluate in under {SECONDS // 60} minutes", took, arguments.seconds < SECONDS)
        )
    print()
    for what, value, good in checks:
        print(f"{'reached' if good else 'MISSED ':8} {what}: {value}")
    with atomic_file(run / "summary.json") as temporary:
        temporary.write_text(
            json.dumps(
                {
                    "config": load_config(str(run / "config.yaml")).model_dump(),
                    "seconds": arguments.seconds,
                    "teacher": scores["teacher"],
                    "student": scores["student"],
                    "checks": [{"what": what, "value": value, "reached": good} for what, value, good in checks],
                },
                indent=2,
            )
            + "\n"
        )
    print()
    for what, name in (("pictures", "comparison.png"), ("curves", "curves.png"), ("numbers", "summary.json")):
        print(f"{what:9}{run / name}")
    print(f"{'student':9}{run / 'student'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
