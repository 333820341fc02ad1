"""What the program computes, as hashes: run it before and after a change that should change no result.

    python scripts/fingerprint.py before.json
    python scripts/fingerprint.py after.json --against before.json

Distils a few embedded recipes for some iterations, and every recipe with a smoke section; generates and scores images.
One process and one thread on the CPU, so that the same machine and versions give the same bits. About six minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import runpy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

CONFIGS = Path(__file__).parent.parent / "configs"
ITERATIONS = 20
LORA = ("student.lora_rank=4", "fake_score.lora_rank=4")
FEW_STEPS = ("student_level=[80.0,2.5]",)
RUNS: dict[str, tuple[str, ...]] = {
    "digits": ("digits",),
    "digits-few-step": ("digits", *FEW_STEPS),
    "digits-sid": ("digits-sid",),
    "digits-uni-instruct": ("digits-uni-instruct",),
    "digits-sida": ("digits-sida",),
    "digits-diffratio": ("digits-diffratio",),
    "digits-dmd": ("digits-dmd", "regression.pairs=64"),
    "digits-t2i": ("digits-t2i",),
    "digits-t2i-lora": ("digits-t2i", *LORA),
}
#: Of a record of metrics.jsonl, what depends on the clock.
TIMED = {"images_per_second", "seconds"}


def fdistill(*arguments: str) -> None:
    """The command line, in this process; raises where it fails."""
    sys.argv = ["fdistill", *arguments]
    heard = io.StringIO()
    try:
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_module("fdistill", run_name="__main__")
    except SystemExit as stopped:
        if stopped.code:
            raise RuntimeError(f"fdistill {' '.join(arguments)}\n{heard.getvalue()}") from stopped


def hash_of_files(folder: Path, *patterns: str) -> str:
    """Of names and contents, in the order of names."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in folder.rglob(pattern)):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def hash_of_run(run: Path) -> dict[str, Any]:
    """Records and student of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{key: value for key, value in record.items() if key not in TIMED} for record in records]
    return {
        "records": hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16],
        "student": hash_of_files(run / "student", "*.safetensors", "model_index.json", "scheduler_config.json"),
        "samples": hash_of_files(run / "samples", "*.png"),
        "last": {key: value for key, value in kept[-1].items() if key.startswith("generator/")},
    }


def fingerprint(folder: Path) -> dict[str, Any]:
    """Everything, by name; `folder` is filled with runs."""
    found: dict[str, Any] = {}
    for name, (config, *settings) in RUNS.items():
        run = folder / name
        common = [f"iterations={ITERATIONS}", "batch_size=16", "log.every=5", "device=cpu", "log.tracker=none"]
        fdistill("distill", config, *common, *settings, "--output", str(run))
        found[name] = hash_of_run(run)
        captioned = "t2i" in name
        images = folder / f"{name}-images"
        asked = ["--prompt", "a bold handwritten seven"] if captioned else []
        fdistill("generate", str(run), "--num-images", "100", "--device", "cpu", *asked, "--output", str(images))
        found[name]["images"] = hash_of_files(images, "*.png")
        if not captioned:
            scores = folder / f"{name}.json"
            fdistill("evaluate", str(images), "--reference", "digits", "--device", "cpu", "--output", str(scores))
            found[name]["scores"] = json.loads(scores.read_text(encoding="utf-8"))["metrics"]
        print(name, found[name], file=sys.stderr, flush=True)
    for path in sorted(CONFIGS.glob("*.yaml")):
        if "\nsmoke:" in path.read_text(encoding="utf-8"):
            name, run = f"{path.stem}-smoke", folder / f"{path.stem}-smoke"
            fdistill("distill", path.stem, "--smoke", "device=cpu", "--output", str(run))
            found[name] = hash_of_run(run)
            print(name, found[name], file=sys.stderr, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--against", type=Path, help="an earlier one; exits with 1 where they differ")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.environ["FDISTILL_CACHE"] = str(Path(name) / "cache")
        found = fingerprint(Path(name))
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text(encoding="utf-8"))
    differing = [name for name in sorted(before.keys() | found.keys()) if before.get(name) != found.get(name)]
    print("differs: " + ", ".join(differing) if differing else f"the same: all {len(found)} runs")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
