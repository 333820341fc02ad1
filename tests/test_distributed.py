"""Two real processes over gloo against one: same global batch, same numbers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from text_families import sd15

from fdistill.checkpoint import checkpoints

WORKER = """
import sys
import torch
import torch.distributed as dist
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from fdistill import rng
from fdistill.distributed import average_gradients, gather_rows, sum_over_processes
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


def launch(arguments: list[str], processes: int = 2) -> None:
    """torchrun on the CPU, each process with one thread."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        str(port),
    ]
    done = subprocess.run(
        [*command, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_collectives_draws_and_ratio(tmp_path: Path) -> None:
    from fdistill import rng
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


@pytest.mark.parametrize(
    ("iterations", "method"),
    [
        (20, []),
        (4, ["method=uni-instruct", "data=teacher-samples", *SAMPLES]),
        (4, ["method=dmd", *SAMPLES]),
        (4, ["method=dmd2", "student_level=[2.5,0.5]"]),
        (4, TEXT),
    ],
    ids=["f-distill", "uni-instruct-data-free", "dmd", "dmd2-two-steps", "text-to-image-lora"],
)
def test_two_processes_train_as_one(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iterations: int, method: list[str]
) -> None:
    settings = [
        f"teacher={tiny_teacher}",
        "batch_size=16",
        f"iterations={iterations}",
        f"log.every={iterations // 4}",
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
        *method,
    ]
    if method is TEXT:
        sd15(tmp_path / "sd15")
        (tmp_path / "prompts.txt").write_text("a cat\na dog on a mat\nthe moon\nan old house\n")
    monkeypatch.chdir(tmp_path)
    for processes in (1, 2):
        output = tmp_path / str(processes)
        monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / f"cache{processes}"))
        launch(["-m", "fdistill", "distill", "digits", *settings, "--output", str(output)], processes)
    one, two = (load_file(checkpoints(tmp_path / n / "checkpoints")[-1] / "state.safetensors") for n in ("1", "2"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name.startswith(("generator.", "fake_score.", "discriminator.", "ema.", "ratio.")):
            torch.testing.assert_close(
                two[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    from fdistill.journal import read_records

    first, second = (read_records(tmp_path / n / "metrics.jsonl") for n in ("1", "2"))
    assert len(first) == len(second) == 4
    for key, value in first[-1].items():
        if isinstance(value, float) and key not in ("seconds", "images_per_second"):
            assert abs(second[-1][key] - value) <= 1e-4 * (1 + abs(value)), key


def test_two_processes_generate_the_same_images(tiny_teacher: Path, tmp_path: Path) -> None:
    from PIL import Image, ImageChops

    for processes in (1, 2):
        arguments = [
            "generate",
            str(tiny_teacher),
            "--num-images",
            "7",
            "--steps",
            "2",
            "--device",
            "cpu",
            "--seed",
            "3",
        ]
        launch(["-m", "fdistill", *arguments, "--output", str(tmp_path / str(processes))], processes)
    names = sorted(path.name for path in (tmp_path / "1").glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(7)] == sorted(path.name for path in (tmp_path / "2").glob("*.png"))
    for name in names:
        difference = ImageChops.difference(Image.open(tmp_path / "1" / name), Image.open(tmp_path / "2" / name))
        assert (difference.getextrema()[1]) <= 1
