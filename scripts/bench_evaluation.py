"""What an evaluation costs: Inception features against torch-fidelity's loop, memory for 50,000 samples, CLIP scores.

python scripts/bench_evaluation.py [--images 512] [--repeats 5] [--device auto] [--output FILE.json]

Networks have seeded random weights, as speed does not depend on them; no file of weights is needed. Each repetition
times both sides, in turn; what is printed is the median of the ratios. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.extractors import Extractor, open_clip_model, open_extractor
from evaluation.features import Extraction, Reading, extract_rows, extract_texts
from evaluation.images import open_images
from evaluation.metrics.clip_score import clip_scores
from evaluation.metrics.frechet import frechet_score
from evaluation.metrics.moments import Moments
from evaluation.metrics.precision_recall import precision_recall
from fdistill.base.devices import start
from fdistill.data.digit_captions import evaluation_prompts

BATCH = 64
SAMPLES = 50_000
PROMPTS = 30_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="through Inception in each repetition")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory", choices=["none", "scores"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    _, device = start(arguments.device)
    if arguments.memory:
        print(json.dumps(memory(arguments.memory == "scores", device)))
        return 0
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "inception": inception(arguments.images, arguments.repeats, device),
        "clip": clip(device),
    }
    used = {part: _measured_apart(part, arguments.device) for part in ("none", "scores")}
    result["memory"] = {
        **used["scores"],
        "beyond_gigabytes": round(used["scores"]["peak_gigabytes"] - used["none"]["peak_gigabytes"], 2),
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def inception(count: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Images a second from PNG files to features: torch-fidelity's loop and loader, and ours, with the same weights."""
    from torch_fidelity.datasets import ImagesPathDataset
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.utils import get_featuresdict_from_dataset

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = random_inception(folder / "weights.pth")
        files = []
        pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
        (folder / "images").mkdir()
        for i, array in enumerate(pixels):
            files.append(folder / "images" / f"{i:06d}.png")
            Image.fromarray(array).save(files[-1])
        layers = ["2048", "logits_unbiased"]
        theirs = FeatureExtractorInceptionV3("x", layers, feature_extractor_weights_path=str(weights)).to(device)
        ours = open_extractor("inception", device, {"inception": weights})
        found: dict[str, Tensor] = {}

        def run_theirs() -> None:
            data = ImagesPathDataset([str(file) for file in files])
            features = get_featuresdict_from_dataset(data, theirs, BATCH, device.type == "cuda", False, False)
            found["theirs"] = features["2048"]

        def run_ours() -> None:
            images = open_images(folder / "images", channels=3, size=32)
            rows = extract_rows([Reading("inception", ours, images)], Extraction(BATCH, device, ""))
            found["ours"] = rows["inception.pool"]

        speeds = [(count / seconds(run_theirs), count / seconds(run_ours)) for _ in range(repeats)]
        return {
            "images": count,
            "torch_fidelity_images_per_second": round(statistics.median(theirs for theirs, _ in speeds), 1),
            "images_per_second": round(statistics.median(ours for _, ours in speeds), 1),
            "ratio": round(statistics.median(ours / theirs for theirs, ours in speeds), 3),
            "ratios": [round(ours / theirs, 3) for theirs, ours in speeds],
            "equal": torch.equal(found["ours"], found["theirs"]),
        }


def random_inception(path: Path) -> Path:
    """A file of weights of Inception's shapes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    torch.manual_seed(0)

    class Untrained(Network):  # type: ignore[misc]
        def load_state_dict(self, *arguments: Any, **options: Any) -> None:
            """Keeps what it was made with."""

    torch.save({}, path)
    network = Untrained("x", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return path


def clip(device: torch.device) -> dict[str, Any]:
    """Seconds for the scores of 30,000 images and prompts, each read once, by the embedded CLIP model of digits."""
    # No two alike, as captions of photographs are: equal ones are encoded once.
    prompts = [f"{prompt.text} {i}" for i, prompt in enumerate(evaluation_prompts(PROMPTS // 10))]
    pixels = np.random.default_rng(0).integers(0, 256, (PROMPTS, 16, 16, 3), np.uint8)
    with tempfile.TemporaryDirectory() as name:
        np.savez(Path(name) / "images.npz", images=pixels)
        images = open_images(Path(name) / "images.npz", channels=3, size=16)
        model = open_clip_model("clip-digits", device, {})
        reads: list[int] = []
        read = images.read

        def counting(indices: Any) -> Tensor:
            reads.append(len(indices))
            return read(indices)

        images.read = counting  # type: ignore[method-assign]

        def run() -> None:
            text = extract_texts(prompts, model.encode_prompts, device=device, describe="")
            readings = [Reading("clip-digits", model.extractor, images)]
            rows = extract_rows(readings, Extraction(BATCH, device, ""))
            clip_scores(rows["clip-digits.image"], text)

        return {"prompts": PROMPTS, "seconds": round(seconds(run), 1), "images_read": sum(reads)}


def memory(scores: bool, device: torch.device) -> dict[str, Any]:
    """Peak memory of this process, with 50,000 rows as Inception's scored, or with the same libraries and nothing done.

    The rows come from random numbers, as the network's own memory is not what is asked.
    """
    took = {}
    if scores:
        generator = torch.Generator().manual_seed(0)

        def run(images: Tensor) -> dict[str, Tensor]:
            widths = {"pool": 2048, "logits": 1008}
            return {name: torch.randn(len(images), width, generator=generator) for name, width in widths.items()}

        with tempfile.TemporaryDirectory() as name:
            np.savez(Path(name) / "images.npz", images=np.zeros((SAMPLES, 32, 32, 3), np.uint8))
            images = open_images(Path(name) / "images.npz", channels=3, size=32)
            extractor = Extractor("inception", {"pool": 2048, "logits": 1008}, run, "", "", True)
            rows = extract_rows([Reading("inception", extractor, images)], Extraction(BATCH, device, ""))
        pool = rows["inception.pool"]
        reference = Moments.of(pool[:10_000] + 0.01)
        took["frechet_seconds"] = round(seconds(lambda: frechet_score(pool, reference, replicates=2)), 1)
        some = pool[:10_000], pool[10_000:20_000]
        took["precision_recall_seconds"] = round(seconds(lambda: precision_recall(*some)), 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"samples": SAMPLES, "peak_gigabytes": round(peak, 2), **took}


def _measured_apart(part: str, device: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--memory", part, "--device", device]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def seconds(run: Callable[[], Any]) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


if __name__ == "__main__":
    sys.exit(main())
