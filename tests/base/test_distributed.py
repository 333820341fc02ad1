"""Two real processes over gloo against one: same global batch, same numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from evaluation.evaluate import evaluate
from fdistill.commands import cli
from fdistill.training import logbook
from fdistill.training.checkpoint import checkpoints
from fdistill.training.journal import read_records
from support.processes import launch, launch_commands
from support.text_families import sd15

WORKER = """
import sys
import torch
import torch.distributed as dist
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from fdistill.base import rng
from fdistill.base.distributed import average_gradients, gather_rows, sum_over_processes
from fdistill.ratio import DensityRatio

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = rng.world()
generator = torch.Generator().manual_seed(0)
noise = rng.normal(generator, 6, (2,))
level = rng.uniform(generator, 6)

everything = torch.Generator().manual_seed(1)
logits, sigma = torch.randn(12, generator=everything) * 3, torch.rand(12, generator=everything) * 50 + 0.01
ratio = DensityRatio(momentum=0.5)
mine = slice(6 * rank, 6 * rank + 6)
weights = [ratio.weight(logits[mine], sigma[mine], "kl") for _ in range(3)][-1]

layer = nn.Linear(2, 1)
nn.init.ones_(layer.weight)
nn.init.zeros_(layer.bias)
unused = nn.Parameter(torch.ones(3))
if rank == 0:
    layer(noise).square().sum().backward()  # rank 1 has no gradient at all
average_gradients([*layer.parameters(), unused])
save_file({
    "noise": gather_rows(noise), "level": gather_rows(level), "weights": weights.contiguous(), "bins": ratio.bins,
    "gradient": layer.weight.grad, "unused": unused.grad, "sum": sum_over_processes(torch.tensor([float(rank + 1)])),
}, Path(sys.argv[1]) / f"{rank}.safetensors")
dist.destroy_process_group()
"""


def test_collectives_draws_and_ratio(tmp_path: Path) -> None:
    from fdistill.base import rng
    from fdistill.ratio import DensityRatio

    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launch([str(script), str(tmp_path)])
    results = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]

    generator = torch.Generator().manual_seed(0)
    noise, level = rng.normal(generator, 12, (2,)), rng.uniform(generator, 12)
    everything = torch.Generator().manual_seed(1)
    logits, sigma = torch.randn(12, generator=everything) * 3, torch.rand(12, generator=everything) * 50 + 0.01
    ratio = DensityRatio(momentum=0.5)
    weights = [ratio.weight(logits, sigma, "kl") for _ in range(3)][-1]
    assert torch.equal(torch.cat([result["weights"] for result in results]), weights)
    for result in results:
        assert torch.equal(result["noise"], noise)
        assert torch.equal(result["level"], level)
        torch.testing.assert_close(result["bins"], ratio.bins, rtol=1e-6, atol=0)
        assert result["sum"].item() == 3
        assert torch.equal(result["unused"], torch.zeros(3))
    weight = torch.ones(1, 2, requires_grad=True)
    (noise[:6] @ weight.T).square().sum().backward()
    assert weight.grad is not None
    for result in results:
        torch.testing.assert_close(result["gradient"], weight.grad / 2)


TEXT = [
    "teacher=sd15",
    "prompts=prompts.txt",
    "data=teacher-samples",
    "teacher_samples.count=32",
    "teacher_samples.num_steps=2",
    "student_level=null",
    "guidance_scale=2.0",
    "fake_score.guidance_scale=1.5",
    "condition_dropout=0.5",
    "student.lora_rank=4",
    "fake_score.lora_rank=4",
    "generator.gan_gradient_ratio=0.5",
]
SAMPLES = ["teacher_samples.count=32", "teacher_samples.num_steps=3", "regression.pairs=32"]


#: Of the two processes: four parts of the whole batch for the student, eight for the critic. One process has it whole.
PARTS = ["generator.micro_batch=4", "fake_score.micro_batch=2"]

#: Iterations, and settings.
METHODS: dict[str, tuple[int, list[str]]] = {
    "f-distill": (20, ["eval.every=10", "eval.num_images=100", 'eval.metrics=["fd_digits"]']),
    "uni-instruct-data-free": (4, ["method=uni-instruct", "data=teacher-samples", *SAMPLES]),
    "dmd": (4, ["method=dmd", *SAMPLES]),
    "dmd2-in-parts": (4, ["method=dmd2", *PARTS]),
    "dmd2-two-steps": (4, ["method=dmd2", "student_level=[2.5,0.5]"]),
    "text-to-image-lora": (4, TEXT),
}
NUM_IMAGES = 7


def commands(teacher: Path, output: str) -> list[list[str]]:
    """A run of every method, and images of the teacher, in the current folder."""
    settings = [
        f"teacher={teacher}",
        "batch_size=16",
        "log.samples_every=0",
        "log.tracker=none",
        "device=cpu",
        "ratio.warmup=5",
        "ratio.momentum=0.5",
        # Adam divides a gradient by its own size: where the true gradient is zero (key biases of attention), it would
        # blow rounding noise up to the size of the learning rate.
        "generator.eps=1e-4",
        "fake_score.eps=1e-4",
        "discriminator.eps=1e-4",
    ]
    if output == "two":
        methods = METHODS
    else:
        methods = {name: (n, [text for text in own if text not in PARTS]) for name, (n, own) in METHODS.items()}
    runs = [
        ["distill", "digits", *settings, f"iterations={n}", f"log.every={n // 4}", *own, "--output", f"{output}/{name}"]
        for name, (n, own) in methods.items()
    ]
    images = ["generate", str(teacher), "--num-images", str(NUM_IMAGES), "--steps", "2", "--device", "cpu", "--seed=3"]
    return [*runs, [*images, "--output", f"{output}/images"]]


class Runs(NamedTuple):
    """Folders of the same commands run by one process and by two."""

    one: Path
    two: Path


@pytest.fixture(scope="module")
def runs(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("processes")
    sd15(folder / "sd15")
    (folder / "prompts.txt").write_text("a cat\na dog on a mat\nthe moon\nan old house\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(logbook, "save_curves", lambda *_: None)
        patch.setenv("FDISTILL_CACHE", str(folder / "cache-one"))
        for arguments in commands(tiny_teacher, "one"):
            cli.app(arguments, standalone_mode=False)
        patch.setenv("FDISTILL_CACHE", str(folder / "cache-two"))
        launch_commands(commands(tiny_teacher, "two"), folder)
    return Runs(folder / "one", folder / "two")


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(runs: Runs, method: str) -> None:
    one, two = (load_file(checkpoints(of / method / "checkpoints")[-1] / "state.safetensors") for of in runs)
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name.startswith(("generator.", "fake_score.", "discriminator.", "ema.", "ratio.")):
            torch.testing.assert_close(
                two[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    first, second = (read_records(of / method / "metrics.jsonl") for of in runs)
    assert len(first) == len(second) == 4
    for key, value in first[-1].items():
        if isinstance(value, float) and key not in ("seconds", "images_per_second"):
            assert abs(second[-1][key] - value) <= 1e-4 * (1 + abs(value)), key


def test_two_processes_score_as_one(runs: Runs) -> None:
    name = "eval/fd_digits@100"
    one, two = (
        {r["iteration"]: r[name] for r in read_records(of / "f-distill" / "metrics.jsonl") if name in r} for of in runs
    )
    assert list(one) == [10, 20]
    assert two == pytest.approx(one, rel=1e-3)
    chosen = re.search(r"after (\d+) iterations", (runs.two / "f-distill" / "best" / "README.md").read_text())
    assert chosen is not None
    best = min(one, key=lambda iteration: one[iteration])
    assert int(chosen[1]) == best
    with pytest.warns(UserWarning, match="the scores' names show the count"):
        alone = evaluate(runs.two / "f-distill" / "best", num_images=100, metrics=["fd_digits"], replicates=0)
    assert alone["metrics"]["fd_digits@100"] == pytest.approx(two[best], rel=1e-6)


def test_two_processes_generate_the_same_images(runs: Runs) -> None:
    names = sorted(path.name for path in (runs.one / "images").glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(NUM_IMAGES)]
    assert names == sorted(path.name for path in (runs.two / "images").glob("*.png"))
    for name in names:
        difference = ImageChops.difference(*(Image.open(of / "images" / name) for of in runs))
        assert difference.getextrema()[1] <= 1
