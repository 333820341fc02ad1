"""Two real processes over gloo against one: same global batch, same numbers."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline
from PIL import Image, ImageChops
from safetensors.torch import load_file

from evaluation.evaluate import evaluate
from fdistill.commands import cli
from fdistill.data.embeddings import EmbeddingSource
from fdistill.training import logbook
from fdistill.training.checkpoint import checkpoints, load_checkpoint
from fdistill.training.journal import read_records
from support.denoisers import tiny_unet
from support.processes import launch, launch_commands
from support.text_families import sd15
from support.thorough import at_night

WORKER = """
import sys
import torch
import torch.distributed as dist
from pathlib import Path
from safetensors.torch import save_file
from fdistill.base import rng
from fdistill.base.distributed import gather_rows, sum_over_processes
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

save_file({
    "noise": gather_rows(noise), "level": gather_rows(level), "weights": weights.contiguous(), "bins": ratio.bins,
    "sum": sum_over_processes(torch.tensor([float(rank + 1)])),
}, Path(sys.argv[1]) / f"{rank}.safetensors")
dist.barrier()  # a process that leaves early can abort the other
dist.destroy_process_group()
"""


@pytest.mark.thorough  # by day, whole runs of two processes equal those of one
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


TEXT = [
    "teacher=sd15",
    "prompts=prompts.txt",
    "data=teacher-samples",
    "teacher_samples.count=37",
    "teacher_samples.num_steps=2",
    "student_level=null",
    "guidance_scale=2.0",
    "fake_score.guidance_scale=1.5",
    "condition_dropout=0.5",
    "student.lora_rank=4",
    "fake_score.lora_rank=4",
    "generator.gan_gradient_ratio=0.5",
    "student.steps=2",
    "augmentation.weight=1.0",
    "diversity.weight=0.5",
    "diversity.steps=1",
]
SAMPLES = ["teacher_samples.count=37", "teacher_samples.num_steps=3", "regression.pairs=37"]


LORA = ["student.lora_rank=4", "fake_score.lora_rank=4"]
SID = ["method=sid", "generator.lr=1e-5"]
SCORES = ["eval.every=4", "eval.num_images=100", "eval.batch_size=50", 'eval.metrics=["fd_digits"]']

#: Iterations, and settings. The first update of "regression" is the student's.
METHODS: dict[str, tuple[int, list[str]]] = {
    "f-distill": (8, SCORES),
    "f-distill-lora": (8, LORA),
    "sid": (8, SID),
    "sid-lora": (8, [*SID, *LORA]),
    "uni-instruct-data-free": (4, ["method=uni-instruct", "data=teacher-samples", *SAMPLES]),
    "dmd": (4, ["method=dmd", *SAMPLES]),
    "regression": (4, ["method=regression", *SAMPLES]),
    "dmd2": (4, ["method=dmd2", "fake_score.alignment=0.1"]),
    "dmd2-two-steps": (4, ["method=dmd2", "student_level=[2.5,0.5]", "reuse_samples=true", "segment.weight=0.5"]),
    "text-to-image-lora": (2, TEXT),
}
FSDP = ["parallel=fsdp"]
#: Of the two processes: what one process computes at once, in four parts for the student and eight for the critic.
PARTS = ["generator.micro_batch=4", "fake_score.micro_batch=2"]

#: What two processes run: {name: (the method that it must equal, further settings)}.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    **{name: (name, []) for name in METHODS if name != "dmd2"},
    "dmd2-in-parts": ("dmd2", PARTS),
    "f-distill-fsdp": ("f-distill", FSDP),
    "f-distill-lora-fsdp": ("f-distill-lora", FSDP),
    "sid-fsdp": ("sid", FSDP),
    "sid-lora-fsdp": ("sid-lora", FSDP),
    "dmd2-in-parts-fsdp": ("dmd2", [*PARTS, *FSDP]),
    "regression-fsdp": ("regression", FSDP),
    "text-to-image-lora-fsdp": ("text-to-image-lora", [*FSDP, "gradient_checkpointing=true"]),
    "text-to-image-lora-offloaded": ("text-to-image-lora", ["offload_frozen=true", "offload_optimizers=true"]),
}
#: What repeats another variant with other losses, other networks, or the other way to share the weights; these run at
#: night. By day, whole weights are on each process, and adapters in shards.
AT_NIGHT = {
    *("f-distill-fsdp", "dmd2-in-parts-fsdp"),
    *("f-distill-lora", "f-distill-lora-fsdp", "sid", "sid-fsdp", "sid-lora", "uni-instruct-data-free", "dmd"),
    *("dmd2-in-parts", "regression", "regression-fsdp", "text-to-image-lora", "text-to-image-lora-offloaded"),
    *("dmd2-two-steps", "sid-lora-fsdp", "chain", "chain-fsdp", "text-to-image-lora-fsdp"),
}
#: Runs that go on after 2 iterations on one process: to 4 on two, and to 6 on one.
CHAINS = {"chain": [], "chain-fsdp": FSDP, "chain-lora-fsdp": [*LORA, *FSDP]}
NUM_IMAGES = 7
#: The larger half of the teacher's blocks is gathered one by one.
SMALL = "from fdistill.training import sharding; sharding.SMALLEST_BLOCK = 2_000"


def settings(teacher: Path) -> list[str]:
    """Those of all runs."""
    return [
        f"teacher={teacher}",
        "batch_size=16",
        "critic_steps=1",
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


def run(teacher: Path, iterations: int, own: list[str], output: str) -> list[str]:
    """A command that runs all iterations, with four records."""
    times = [f"iterations={iterations}", f"log.every={max(iterations // 4, 1)}"]
    return ["distill", "digits", *settings(teacher), *times, *own, "--output", output]


def images(teacher: Path, output: str) -> list[str]:
    """A command that makes images of the teacher."""
    counted = ["--num-images", str(NUM_IMAGES), "--steps", "2", "--device", "cpu", "--seed=3"]
    return ["generate", str(teacher), *counted, "--output", output]


def chained(teacher: Path, iterations: int, names: Collection[str]) -> list[list[str]]:
    """The chains of these names up to an iteration."""
    more = [] if iterations == 2 else ["--resume"]
    return [[*run(teacher, iterations, CHAINS[name], f"chains/{name}"), "log.every=2", *more] for name in names]


class Runs(NamedTuple):
    """Folders of the same commands run by one process and by two."""

    one: Path
    two: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    left_out = AT_NIGHT if request.config.getoption("markexpr") == "not thorough" else set()
    variants = {name: variant for name, variant in VARIANTS.items() if name not in left_out}
    methods, chains = {method for method, _ in variants.values()}, CHAINS.keys() - left_out
    folder = tmp_path_factory.mktemp("processes")
    teacher = folder / "teacher"  # of few blocks: each is gathered and freed in every pass
    torch.manual_seed(0)
    unet = tiny_unet(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.75)
    ConsistencyModelPipeline(unet=unet, scheduler=scheduler).save_pretrained(teacher)
    sd15(folder / "sd15")
    # So many that processes share them; the last batch has an odd number.
    (folder / "prompts.txt").write_text("".join(f"a dog and {number} cats\n" for number in range(300 - 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(logbook, "save_curves", lambda *_: None)
        patch.setenv("FDISTILL_CACHE", str(folder / "cache-one"))
        alone = [run(teacher, n, own, f"one/{name}") for name, (n, own) in METHODS.items() if name in methods]
        whole = [run(teacher, 6, LORA if "lora" in name else [], f"one/{name}") for name in chains]
        for arguments in [*alone, *whole, images(teacher, "one/images"), *chained(teacher, 2, chains)]:
            cli.app(arguments, standalone_mode=False)
        patch.setenv("FDISTILL_CACHE", str(folder / "cache-two"))
        together = [
            run(teacher, METHODS[method][0], [*METHODS[method][1], *own], f"two/{name}")
            for name, (method, own) in variants.items()
        ]
        launch_commands([*together, images(teacher, "two/images"), *chained(teacher, 4, chains)], folder, SMALL)
        for arguments in chained(teacher, 6, chains):
            cli.app(arguments, standalone_mode=False)
    return Runs(folder / "one", folder / "two")


def assert_equal_runs(one: Path, two: Path) -> None:
    """Their last checkpoints hold the same weights, averages and ratios."""
    first, second = (load_checkpoint(checkpoints(of / "checkpoints")[-1])[0] for of in (one, two))
    assert first.keys() == second.keys()
    for name, value in first.items():
        if name.startswith(("generator.", "fake_score.", "discriminator.", "ema.", "ratio.")):
            torch.testing.assert_close(
                second[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("variant", at_night(VARIANTS, AT_NIGHT.__contains__))
def test_two_processes_train_as_one(runs: Runs, variant: str) -> None:
    one, two = runs.one / VARIANTS[variant][0], runs.two / variant
    assert_equal_runs(one, two)
    first, second = (read_records(of / "metrics.jsonl") for of in (one, two))
    assert len(first) == len(second) == min(4, METHODS[VARIANTS[variant][0]][0])
    for key, value in first[-1].items():
        if isinstance(value, float) and key not in ("seconds", "images_per_second", "memory_gb"):
            assert abs(second[-1][key] - value) <= 1e-4 * (1 + abs(value)), key


@pytest.mark.thorough  # of the text-to-image runs
def test_two_processes_encode_the_same_prompts(runs: Runs) -> None:
    """Each encodes a part of every batch, and one writes them in their order."""
    (one,), (two,) = ((runs.one.parent / cache / "text").iterdir() for cache in ("cache-one", "cache-two"))
    first, second = EmbeddingSource(one), EmbeddingSource(two)
    assert len(first) == 299
    assert list(first.prompts) == list(second.prompts)
    for name, value in first.rows(torch.arange(299)).tensors.items():
        torch.testing.assert_close(second.rows(torch.arange(299))[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chain", at_night(CHAINS, AT_NIGHT.__contains__))
def test_a_run_goes_on_with_more_and_fewer_processes(runs: Runs, chain: str) -> None:
    assert_equal_runs(runs.one / chain, runs.one.parent / "chains" / chain)


@pytest.mark.parametrize(
    "variant",
    at_night(["f-distill", "f-distill-fsdp", "sid-lora-fsdp", "text-to-image-lora-fsdp"], AT_NIGHT.__contains__),
)
def test_two_processes_export_the_same_student(runs: Runs, variant: str) -> None:
    one, two = runs.one / VARIANTS[variant][0] / "student", runs.two / variant / "student"
    names = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert names
    assert names == sorted(path.relative_to(two) for path in two.rglob("*.safetensors"))
    for name in names:
        first, second = load_file(one / name), load_file(two / name)
        assert first.keys() == second.keys()
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", at_night(["f-distill", "f-distill-fsdp"], AT_NIGHT.__contains__))
def test_two_processes_score_as_one(runs: Runs, variant: str) -> None:
    name, folders = "eval/fd_digits@100", (runs.one / "f-distill", runs.two / variant)
    one, two = ({r["iteration"]: r[name] for r in read_records(of / "metrics.jsonl") if name in r} for of in folders)
    assert list(one) == [4, 8]
    assert two == pytest.approx(one, rel=1e-3)
    chosen = re.search(r"after (\d+) iterations", (runs.two / variant / "best" / "README.md").read_text())
    assert chosen is not None
    best = min(one, key=lambda iteration: one[iteration])
    assert int(chosen[1]) == best
    with pytest.warns(UserWarning, match="the scores' names show the count"):
        alone = evaluate(runs.two / variant / "best", num_images=100, metrics=["fd_digits"], replicates=0)
    assert alone["metrics"]["fd_digits@100"] == pytest.approx(two[best], rel=1e-6)


def test_two_processes_generate_the_same_images(runs: Runs) -> None:
    names = sorted(path.name for path in (runs.one / "images").glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(NUM_IMAGES)]
    assert names == sorted(path.name for path in (runs.two / "images").glob("*.png"))
    for name in names:
        difference = ImageChops.difference(*(Image.open(of / "images" / name) for of in runs))
        assert difference.getextrema()[1] <= 1
