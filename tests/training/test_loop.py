"""Whole runs with a tiny untrained teacher: run folder, resume, refusals, NaN."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fdistill import distill, load_student
from fdistill.base.errors import CheckpointError, ConfigError, DataError, NonFiniteError, OutputError
from fdistill.commands.dry_run import describe
from fdistill.config.reading import load_config
from fdistill.training.appearance import appearance
from fdistill.training.checkpoint import checkpoints

QUICK = {"batch_size": 8, "iterations": 4, "log.every": 2, "log.samples_every": 2, "log.checkpoint_every": 2}


def run(tiny_teacher: Path, output: Path, **overrides: object) -> Path:
    resume = bool(overrides.pop("resume", False))
    return distill("digits", output=output, resume=resume, **{"teacher": str(tiny_teacher), **QUICK, **overrides})


def weights(student: Path) -> dict[str, torch.Tensor]:
    return load_file(student / "unet" / "diffusion_pytorch_model.safetensors")


def same(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def cells(path: Path) -> torch.Tensor:
    """The images uint8 [80, 1, 8, 8] of a grid with ten columns, each enlarged 8 times and framed by one pixel."""
    picture = torch.from_numpy(np.array(Image.open(path)))
    framed = picture.reshape(8, 66, 10, 66).permute(0, 2, 1, 3).reshape(80, 1, 66, 66)
    return framed[..., 1:-1:8, 1:-1:8]


def test_run_folder(tiny_teacher: Path, tmp_path: Path) -> None:
    student = run(tiny_teacher, tmp_path / "run", **{"ema.decays": [0.5, 0.9], "ema.export": 0.5})
    folder = tmp_path / "run"
    assert student == folder / "student"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "data.json",
        "metrics.jsonl",
        "samples",
        "checkpoints",
        "student",
        "tensorboard",
        "curves.png",
        "environment.json",
    }
    resolved = load_config(str(folder / "config.yaml"))
    assert (resolved.batch_size, resolved.ema.decays, resolved.divergence) == (8, [0.5, 0.9], "jensen-shannon")
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [
        "000000.png",
        "000002.png",
        "000004.png",
        "data.png",
        "teacher.png",
    ]
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["000002", "000004"]
    assert any((folder / "tensorboard").iterdir())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [2, 4]
    for name in (
        "images_per_second",
        "memory_gb",
        "fake_score/denoising",
        "fake_score/grad_norm",
        "discriminator/gan_real",
        "discriminator/gan_fake",
        "discriminator/accuracy",
        "discriminator/grad_norm",
        "generator/matching",
        "generator/gan",
        "generator/grad_norm",
        "generator/h",
        "generator/h_min",
        "generator/h_max",
        "generator/clamped_ratios",
    ):
        assert isinstance(records[0][name], float), name
    assert len(records[0]["discriminator/accuracy_per_bin"]) == 10
    for record in records:
        for whose, name in (("", f"{record['iteration']:06d}"), ("teacher_", "teacher")):
            look = appearance(cells(folder / "samples" / f"{name}.png"), [index % 10 for index in range(80)])
            assert {key: record[f"samples/{whose}{key}"] for key in look} == pytest.approx(look, rel=1e-12)
    assert load_student(folder)(torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 9])).shape == (3, 1, 8, 8)


def test_the_exported_weights_are_the_ema(tiny_teacher: Path, tmp_path: Path) -> None:
    """decay 0.5 over two iterations: a half of the last weights, a quarter of each earlier pair; not the raw
    weights."""
    student = run(tiny_teacher, tmp_path / "run", iterations=2, **{"ema.decays": [0.5, 0.0], "ema.export": 0.5})
    state = load_file(checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.safetensors")
    exported = weights(student)
    for name, value in exported.items():
        assert torch.equal(value, state[f"ema.0.5.denoiser.network.{name}"])
        assert torch.equal(state[f"ema.0.0.denoiser.network.{name}"], state[f"generator.denoiser.network.{name}"])
    assert any(not torch.equal(exported[name], state[f"generator.denoiser.network.{name}"]) for name in exported)


@pytest.fixture(scope="module")
def plain(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_teacher, tmp_path_factory.mktemp("plain") / "run", iterations=2, **{"log.samples_every": 0})


@pytest.mark.parametrize(
    ("changes", "logged", "not_logged"),
    [
        ({"divergence": "forward-kl", "discriminator.source": "teacher"}, "generator/h", "discriminator/r1"),
        (
            {"divergence": "rkl", "discriminator.gan_weight": 0.0, "generator.gan_weight": 0.0},
            "generator/matching",
            "discriminator/grad_norm",
        ),
        (
            {"divergence": "alpha(0.5)", "discriminator.r1_weight": 1.0, "discriminator.features": ["down0", "mid"]},
            "discriminator/r1",
            "generator/image",
        ),
        (
            {"precision": "bf16", "fake_score.weighting": "min-snr", "critic_levels.sampler": "lognormal"},
            "generator/gan",
            "discriminator/r1",
        ),
        (
            {"ratio.bin_edges": "linear", "ratio.momentum": 0.5, "critic_steps": 1, "student_level": None},
            "generator/clamped_ratios",
            "discriminator/r1",
        ),
    ],
    ids=["teacher-features", "no-gan", "r1", "bf16", "published-bins"],
)
def test_options_run(
    tiny_teacher: Path, tmp_path: Path, plain: Path, changes: dict[str, object], logged: str, not_logged: str
) -> None:
    """What the options do is in test_updates; here, that a whole run with them is finite, another one, and says so."""
    student = run(
        tiny_teacher, tmp_path / "run", iterations=2, **{"log.samples_every": 0, "log.tracker": "none", **changes}
    )
    found, untrained = weights(student), load_file(tiny_teacher / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in found.values())
    assert any(not torch.equal(value, untrained[name]) for name, value in found.items())
    assert not same(student, plain)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert logged in record
    assert not_logged not in record


def test_resumed_equals_uninterrupted_bit_by_bit(tiny_teacher: Path, tmp_path: Path) -> None:
    changes = {"ratio.momentum": 0.5, "ratio.warmup": 3}  # state in the bins, and in the ramp
    straight = run(tiny_teacher, tmp_path / "straight", **changes)
    run(tiny_teacher, tmp_path / "resumed", iterations=2, **changes)
    resumed = run(tiny_teacher, tmp_path / "resumed", resume=True, **changes)
    assert same(straight, resumed)
    lines = (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [2, 4]
    assert not same(straight, run(tiny_teacher, tmp_path / "other", seed=1, **changes))


def test_resume_without_a_checkpoint_starts(tiny_teacher: Path, tmp_path: Path) -> None:
    assert run(tiny_teacher, tmp_path / "new", resume=True, iterations=1).is_dir()


def test_output_folders_that_are_not_free_are_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    run(tiny_teacher, tmp_path / "run", iterations=1)
    with pytest.raises(OutputError, match="--resume"):
        run(tiny_teacher, tmp_path / "run", iterations=2)
    with pytest.raises(ConfigError, match=r"generator\.beta1: 0\.0 -> 0\.5"):
        run(tiny_teacher, tmp_path / "run", iterations=2, resume=True, **{"generator.beta1": 0.5})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    with pytest.raises(OutputError, match="not a run"):
        run(tiny_teacher, tmp_path / "photos")
    with pytest.raises(OutputError, match="is a file"):
        run(tiny_teacher, tmp_path / "photos" / "cat.png")
    with pytest.raises(OutputError, match="cannot write"):
        run(tiny_teacher, tmp_path / "photos" / "cat.png" / "below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "run"]
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.png"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"divergence": "jensen"}, ConfigError, "did you mean 'jensen-shannon'"),
        ({"divergence": "js", "discriminator.gan_weight": 0}, ConfigError, "expected discriminator.gan_weight > 0"),
        ({"divergence": "rkl", "discriminator.gan_weight": 0}, ConfigError, "or generator.gan_weight=0 as well"),
        ({"log.tracker": "wandb"}, ConfigError, "pip install wandb"),
        ({"discriminator.features": ["middle"]}, ConfigError, "did you mean 'mid'"),
        ({"student_level": 81}, ConfigError, r"level: expected a number in \(0.002, 80\]"),
        ({"data": "digitts"}, DataError, "did you mean 'digits'"),
        ({"teacher": "no/such/teacher"}, CheckpointError, "no such folder"),
        ({"device": "mps" if not torch.backends.mps.is_available() else "cuda"}, ConfigError, "not available"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    tiny_teacher: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(tiny_teacher, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_data_of_another_shape_is_refused(tmp_path: Path) -> None:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    from support.denoisers import tiny_unet

    for name, unet, message in (
        ("large", tiny_unet(sample_size=16), r"\(1, 8, 8\).*\(1, 16, 16\)"),
        ("few", tiny_unet(num_class_embeds=7), "class 9.*0 to 6"),
    ):
        ConsistencyModelPipeline(unet=unet, scheduler=CMStochasticIterativeScheduler()).save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / name, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_breaks_keeps_the_last_good_checkpoint_and_says_how_to_go_on(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    """The advice is followed as it stands, and works."""
    folder, checks = tmp_path / "run", {"log.checkpoint_every": 1, "generator.lr_warmup": 0}
    run(tiny_teacher, folder, iterations=1, **checks)
    good = checkpoints(folder / "checkpoints")
    before = (good[-1] / "state.safetensors").read_bytes()
    with pytest.raises(NonFiniteError) as caught:
        run(tiny_teacher, folder, iterations=4, resume=True, **checks, **{"generator.lr": 1e6})
    message = str(caught.value)
    assert "stopped at iteration 2: generator: its updates took the norm of its weights from " in message
    assert f"last good checkpoint is {good[-1]}" in message
    assert checkpoints(folder / "checkpoints") == good
    assert (good[-1] / "state.safetensors").read_bytes() == before

    advised = re.fullmatch(r".*; to go on, add --resume (generator\.lr)=([\d.e-]+)", message)
    assert advised is not None
    setting = {advised[1]: float(advised[2])}
    assert 1e-7 < setting["generator.lr"] < 1e-2
    run(tiny_teacher, folder, iterations=4, resume=True, **checks, **setting)
    assert load_config(folder / "config.yaml").generator.lr == setting["generator.lr"]
    changed = [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in changed] == [1, 1]
    first, second = (record["changed"]["generator.lr"] for record in changed)
    assert first == {"from": 4e-4, "to": 1e6}
    assert second == {"from": 1e6, "to": setting["generator.lr"]}


@pytest.mark.thorough
def test_the_role_that_broke_the_others_is_named(tiny_teacher: Path, tmp_path: Path) -> None:
    """Not the fake score, whose loss on the student's samples is NaN by the time of the record."""
    quiet = {"log.every": 4, "log.checkpoint_every": 0, "log.samples_every": 0}
    for lr in (1e6, 1e30):
        with pytest.raises(NonFiniteError) as caught:
            run(tiny_teacher, tmp_path / f"{lr:g}", **quiet, **{"generator.lr": lr})
        message = str(caught.value)
        assert "there is no good checkpoint yet; to go on, add --resume generator.lr=" in message
        assert "stopped at iteration 4: generator: its updates took the norm of its weights from " in message
    run(tiny_teacher, tmp_path / "1e+30", resume=True, **quiet, **{"generator.lr": 1e-4})


def test_the_learning_rate_of_a_stage(tiny_teacher: Path, tmp_path: Path) -> None:
    quiet = {"iterations": 4, "log.every": 1, "log.checkpoint_every": 0, "log.samples_every": 0}

    def stages(lr: float) -> list[dict[str, object]]:
        return [{"iterations": 2}, {"iterations": 2, "generator.lr": lr}]

    with pytest.raises(NonFiniteError) as caught:
        run(tiny_teacher, tmp_path / "run", stages=stages(1e6), **quiet)
    advised = re.search(
        r"write generator\.lr=([\d.e-]+) into stage 2 of the config, and add --resume$", str(caught.value)
    )
    assert advised is not None
    run(tiny_teacher, tmp_path / "run", stages=stages(float(advised[1])), resume=True, **quiet)
    (changed,) = (tmp_path / "run" / "changes.jsonl").read_text().splitlines()
    assert json.loads(changed)["changed"]["stage 2.generator.lr"] == {"from": 1e6, "to": float(advised[1])}


def test_weights_an_update_has_broken_are_not_saved(tiny_teacher: Path, tmp_path: Path) -> None:
    broken = {"generator.lr": 1e30, "generator.weight_decay": 1e30}
    with pytest.raises(
        NonFiniteError, match=r"generator: its updates took the norm of its weights from .* to (nan|inf)"
    ):
        run(tiny_teacher, tmp_path / "run", iterations=1, **broken)
    assert checkpoints(tmp_path / "run" / "checkpoints") == []
    assert not (tmp_path / "run" / "student").exists()


def test_no_samples_when_they_are_off(tiny_teacher: Path, tmp_path: Path) -> None:
    run(tiny_teacher, tmp_path / "run", iterations=1, **{"log.samples_every": 0})
    assert not (tmp_path / "run" / "samples").exists()


FULL_DISK = """
import resource, sys
from fdistill.commands.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))  # the kernel refuses larger files
sys.argv = ["fdistill", "distill", "digits", *sys.argv[1:]]
main()
"""


@pytest.mark.thorough  # by day, tests/base/test_files_and_checkpoints.py
def test_a_full_disk_is_one_message(tiny_teacher: Path, tmp_path: Path) -> None:
    settings = [
        f"teacher={tiny_teacher}",
        "batch_size=8",
        "iterations=2",
        "log.samples_every=0",
        "log.checkpoint_every=1",
    ]
    command = [sys.executable, "-c", FULL_DISK, *settings, "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "student").exists()


def test_a_run_is_not_shortened_by_resuming_it(tiny_teacher: Path, tmp_path: Path) -> None:
    run(tiny_teacher, tmp_path / "run")
    with pytest.raises(ConfigError, match="at iteration 4 already"):
        run(tiny_teacher, tmp_path / "run", resume=True, iterations=3)


def test_dry_run_says_what_would_be_done(tiny_teacher: Path) -> None:
    text = describe(load_config("digits", [f"teacher={tiny_teacher}", "divergence=js"]))
    assert "divergence     jensen-shannon" in text
    assert "discriminator  convolutional heads on fake features mid" in text
    assert "420, each 2 critic updates and then 1 student update of 64 samples" in text
    assert "one evaluation from level 2.5" in text
