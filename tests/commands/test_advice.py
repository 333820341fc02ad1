"""What messages of commands advise is tried: the command works once the advice is followed, word for word where the
message has the words. Advice about settings alone is in tests/config/test_advice.py.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from diffusers import LatentConsistencyModelPipeline, LCMScheduler
from typer.testing import CliRunner

from fdistill.adapters.unet2d_condition import tiny_unet as condition_unet
from fdistill.base.errors import FDistillError
from fdistill.commands.cli import app
from fdistill.commands.tiny_pipelines import tiny_pipeline
from support.advice import ADVICE, RUN, TEXT, Words, evaluate, make_files, text
from support.thorough import at_night


def ended(arguments: Words) -> tuple[str, str]:
    """(the message of the error that a command ended with, "" if it worked; what it printed)."""
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, FDistillError):
        return str(result.exception), result.output
    assert result.exit_code == 0, f"{arguments}: {result.output} {result.exception!r}"
    return "", result.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_files(folder, tiny_teacher)
    return folder


def _placed(words: Words, made: Path, out: Path) -> Words:
    found = [word.replace("MADE", str(made)).replace("OUT", str(out)) for word in words]
    writes = found[0] in ("distill", "generate", "convert", "cache", "ema") and "--output" not in found
    return [*found, "--output", str(out)] if writes else found


def _takes_long(row: tuple[Words, str, list[Words]]) -> bool:
    """There is more than one way out, or images are scored, which tests below do as well."""
    wrong, _, advised = row
    return len(advised) > 1 or wrong[0] == "evaluate"


@pytest.mark.parametrize(
    ("wrong", "words", "advised"), at_night(ADVICE, _takes_long), ids=[words for _, words, _ in ADVICE]
)
def test_commands_work_once_advice_is_followed(
    wrong: Words, words: str, advised: list[Words], made: Path, tmp_path: Path
) -> None:
    message, _ = ended(_placed(wrong, made, tmp_path / "wrong"))
    assert words in message
    assert not list(tmp_path.iterdir())
    for number, command in enumerate(advised):
        assert ended(_placed(command, made, tmp_path / f"out{number}"))[0] == "", command


@pytest.mark.parametrize(
    "settings",
    [
        ["guidance_scale=2", "negative_prompt=a house by the sea", "images.recipe=squash", "images.flip=true"],
        ["teacher_lora=MADE/lora.safetensors", "teacher_lora_scale=0.5", "resolution=32"],
        ["teacher=MADE/no-vae", "vae=MADE/text", "precision=bf16", "frozen_precision=bf16"],
    ],
    ids=["guidance", "lora", "vae"],
)
def test_the_advised_cache_command_makes_what_the_run_takes(settings: Words, made: Path, tmp_path: Path) -> None:
    message, _ = ended(_placed(text("data=MADE/captioned", *settings), made, tmp_path / "run"))
    advised = re.search(r"encode them once with `fdistill (cache .*)`, and pass data=FOLDER", message)
    assert advised is not None, message
    latents = tmp_path / "my latents"
    command = [str(latents) if word == "FOLDER" else word for word in shlex.split(advised[1])]
    assert ended([*command, "--workers", "1", "--device", "cpu"])[0] == ""
    assert ended(_placed(text(f"data={latents}", *settings), made, tmp_path / "run"))[0] == ""


def test_captions_encoded_with_another_negative_prompt(made: Path, tmp_path: Path) -> None:
    cache = ["cache", str(made / "captioned"), "--teacher", str(made / "text"), "--workers", "1", "--output"]
    assert ended([*cache, str(tmp_path / "first")])[0] == ""
    guided = ["guidance_scale=2", "negative_prompt=a house"]
    message, _ = ended(_placed(text(f"data={tmp_path / 'first'}", *guided), made, tmp_path / "run"))
    assert "make it again with fdistill cache --negative-prompt, or change the setting" in message
    assert ended([*cache, str(tmp_path / "again"), "--negative-prompt", "a house"])[0] == ""
    for settings in ([f"data={tmp_path / 'again'}", *guided], [f"data={tmp_path / 'first'}", "guidance_scale=2"]):
        assert ended(_placed(text(*settings), made, tmp_path / "run"))[0] == ""


def test_latents_of_another_resolution(made: Path, tmp_path: Path) -> None:
    cache = ["cache", str(made / "captioned"), "--teacher", str(made / "text"), "--workers", "1", "--output"]
    assert ended([*cache, str(tmp_path / "first")])[0] == ""
    message, _ = ended(_placed(text(f"data={tmp_path / 'first'}", "resolution=32"), made, tmp_path / "run"))
    assert "in another frozen_precision; make them again with fdistill cache" in message
    assert ended([*cache, str(tmp_path / "again"), "--resolution", "32"])[0] == ""
    for settings in ([f"data={tmp_path / 'again'}", "resolution=32"], [f"data={tmp_path / 'first'}"]):
        assert ended(_placed(text(*settings), made, tmp_path / "run"))[0] == ""


def test_files_to_compare_are_those_that_evaluate_writes(made: Path, tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for file in files:
        Path(file).write_text("[]")
    assert "; expected a file of `fdistill evaluate --output`" in ended(["compare", *files])[0]
    for file, images in zip(files, ("eight", "eight.npz"), strict=True):
        assert ended([*evaluate(str(made / images), "--metrics", "class_accuracy"), "--output", file])[0] == ""
    assert ended(["compare", *files])[0] == ""


def test_a_reference_of_statistics_where_images_are_needed(made: Path, tmp_path: Path) -> None:
    statistics = str(tmp_path / "eight.npz")
    assert ended(["reference", str(made / "eight"), "--output", statistics])[0] == ""
    command = [*evaluate(str(made / "eight.npz"), "--metrics", "recall"), "--reference"]
    assert "holds statistics alone; pass the images" in ended([*command, statistics])[0]
    assert ended([*command, str(made / "eight")])[0] == ""


def test_ends_of_names_that_adapters_take(made: Path, tmp_path: Path) -> None:
    lora = ["data=null", "prompts=MADE/prompts.txt", "student.lora_rank=2"]
    message, _ = ended(_placed(text(*lora, "student.lora_targets=[nothing]"), made, tmp_path / "run"))
    advised = re.search(r"expected ends of names, such as (\S+)$", message)
    assert advised is not None
    assert ended(_placed(text(*lora, f"student.lora_targets=[{advised[1]}]"), made, tmp_path / "run"))[0] == ""


def test_a_single_file_and_a_lora_are_given_with_their_pipeline(made: Path, tmp_path: Path) -> None:
    run = ["data=null", "prompts=MADE/prompts.txt"]
    unet = made / "text" / "unet" / "diffusion_pytorch_model.safetensors"
    message, _ = ended(_placed(text(*run, f"teacher={unet}"), made, tmp_path / "run"))
    assert "set teacher_base to the folder or hub id of the pipeline it was trained from" in message
    assert ended(_placed(text(*run, f"teacher={unet}", "teacher_base=MADE/text"), made, tmp_path / "run"))[0] == ""
    message, _ = ended(_placed(text(*run, "teacher=MADE/lora.safetensors"), made, tmp_path / "run"))
    assert "set teacher to the pipeline it belongs to and teacher_lora to this file" in message
    assert ended(_placed(text(*run, "teacher_lora=MADE/lora.safetensors"), made, tmp_path / "run"))[0] == ""


def test_a_run_that_is_there_already(made: Path, tmp_path: Path) -> None:
    run = ["distill", "digits", f"teacher={made / 'tiny'}", "batch_size=4", "iterations=1", "log.samples_every=0"]
    run += ["log.tracker=none", "device=cpu", "--output"]
    assert ended([*run, str(tmp_path / "run")])[0] == ""
    message, _ = ended([*run, str(tmp_path / "run")])
    assert "add --resume to go on with it, or choose another folder" in message
    assert ended([*run, str(tmp_path / "run"), "--resume"])[0] == ""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    assert "not a run (no config.yaml); choose another folder" in ended([*run, str(tmp_path / "photos")])[0]
    message, _ = ended([*run, str(tmp_path / "run"), "--resume", "seed=1"])
    assert "resume with its own settings, or choose another folder" in message
    assert ended([*run, str(tmp_path / "other"), "--resume", "seed=1"])[0] == ""


def test_a_student_without_adapters_has_no_lora_file(made: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(TEXT, tmp_path / "whole", ignore=shutil.ignore_patterns("pytorch_lora*"))
    message, _ = ended(["export", str(whole), "--format", "lora", "--output", str(tmp_path / "a.safetensors")])
    assert "train with student.lora_rank, or export with --format comfy" in message
    assert ended(["export", str(whole), "--format", "comfy", "--output", str(tmp_path / "a.safetensors")])[0] == ""


def test_a_damaged_snapshot_can_be_deleted(tmp_path: Path) -> None:
    run = shutil.copytree(RUN, tmp_path / "run")
    snapshot = run / "ema" / "000001-0.1.safetensors"
    snapshot.write_bytes(snapshot.read_bytes()[:-9])
    command = ["ema", str(run), "--sigma-rel", "0.12", "--output", str(tmp_path / "student")]
    assert "delete that file to do without it" in ended(command)[0]
    snapshot.unlink()
    assert ended(command)[0] == ""


def test_a_pipeline_that_diffusers_alone_runs(tmp_path: Path) -> None:
    parts = tiny_pipeline("StableDiffusionPipeline", scheduler=LCMScheduler()).components
    lcm = {**parts, "unet": condition_unet(time_cond_proj_dim=8)}
    LatentConsistencyModelPipeline(**lcm, requires_safety_checker=False).save_pretrained(tmp_path / "lcm")
    command = ["generate", str(tmp_path / "lcm"), "--num-images", "1", "--steps", "1", "--prompt", "a", "--output"]
    assert "`--sampler pipeline` runs it with diffusers itself" in ended([*command, str(tmp_path / "a")])[0]
    assert ended([*command, str(tmp_path / "a"), "--sampler", "pipeline"])[0] == ""


def test_features_are_kept_where_the_cache_can_be_written(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    command = evaluate(str(made / "eight"), "--metrics", "fd_digits")
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="features are not kept: .*set FDISTILL_CACHE to a folder that can be written"):
        assert ended(command)[0] == ""
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))
    assert ended(command)[0] == ""
    assert list((tmp_path / "cache").rglob("*.safetensors"))
