"""`fdistill init`: the config that it writes trains or dry-runs, says its reasons, and wrong answers are refused."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML
from typer.testing import CliRunner, Result

from fdistill.base.errors import ConfigError, FDistillError
from fdistill.commands.cli import app
from fdistill.commands.init import command, fitting
from fdistill.commands.init.answers import Hardware, read_hardware
from fdistill.commands.init.draft import Draft
from fdistill.config.reading import load_config
from fdistill.config.schema import DistillConfig
from fdistill.planning.remedies import Remedy
from support.families import FAMILIES
from support.text_families import TEXT_FAMILIES
from support.text_families_dit import TEXT_FAMILIES_DIT
from support.thorough import at_night

TEXT = {**TEXT_FAMILIES, **TEXT_FAMILIES_DIT}
#: Embedded teacher -> data that fit it.
EMBEDDED = {"digits": "digits", "digits-t2i": "digit-captions", "digit-pairs": "digit-pairs"}
#: (family, steps, goal, the recipe that it gets).
ROWS = [
    ("sd15", 1, "quality", "sd15"),
    ("sd15", 4, "lora", "sd15-lora-24gb"),
    ("sd21v", 2, "diversity", "sd21-v"),
    ("sdxl", 1, "speed", "sdxl"),
    ("sdxl", 8, "quality", "sdxl"),
    ("sd3", 4, "quality", "sd35-medium"),
    ("sd3", 1, "diversity", "sd35-medium"),
    ("flux-dev", 4, "lora", "flux-dev"),
    ("flux-schnell", 1, "speed", "flux-dev"),
    ("pixart", 1, "quality", "pixart-sigma"),
    ("pixart-alpha", 4, "lora", "pixart-sigma"),
    ("sana", 4, "quality", "sana"),
    ("sana", 1, "diversity", "sana"),
    ("lumina2", 4, "quality", "sd35-medium"),
    ("qwen-image", 1, "quality", "qwen-image"),
    ("z-image", 4, "diversity", "z-image"),
    ("flux2-klein", 4, "speed", "flux2-klein-lora-24gb"),
]
#: (family, the recipe that it gets), of those that take no prompts.
OTHER_ROWS = [
    ("ddpm", "ddpm-cifar10"),
    ("consistency", "cifar10-cond"),
    ("flow", "ddpm-cifar10"),
    ("edm-ddpmpp", "cifar10-cond"),
    ("edm-adm", "imagenet64"),
    ("edm2", "imagenet512"),
    ("dit", "imagenet256"),
    ("sit", "imagenet256"),
]
#: One of each way to go: as the recipe is, adapters, heads that it has not, no recipe of the family, other levels.
BY_DAY = [ROWS[0], ROWS[1], ROWS[12], ROWS[13], OTHER_ROWS[1], OTHER_ROWS[2]]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with a list of prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog on a mat\nthe moon\n")
    return tmp_path


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan can be made; counting takes half a minute for each network."""

    def refuse(*_: Any) -> None:
        raise ConfigError("nothing was counted")

    monkeypatch.setattr(fitting, "make_plan", refuse)


def options(teacher: object, data: object, hardware: str = "cpu", steps: int = 1, goal: str = "quality") -> list[str]:
    answers = {"teacher": teacher, "data": data, "hardware": hardware, "steps": steps, "goal": goal}
    return ["init", *(part for name, answer in answers.items() for part in (f"--{name}", str(answer)))]


def run(arguments: list[str], answers: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=answers)


def written(arguments: list[str], output: str = "my.yaml") -> DistillConfig:
    """The config that init writes."""
    done = run([*arguments, "--output", output])
    assert done.exit_code == 0, done.exception or done.output
    return load_config(output)


def refusal(arguments: list[str]) -> str:
    """The message of a command that must write nothing."""
    done = run(arguments)
    assert isinstance(done.exception, FDistillError), done.output
    assert not Path("my.yaml").exists()
    return str(done.exception)


def dry_run(output: str = "my.yaml") -> str:
    done = run(["distill", output, "device=cpu", "images.workers=1", "--dry-run", "--output", "run"])
    assert done.exit_code == 0, done.exception or done.output
    return done.output


@pytest.mark.parametrize("teacher", at_night(EMBEDDED, lambda teacher: teacher != "digits"))
def test_the_config_for_an_embedded_teacher_trains(teacher: str) -> None:
    written(options(teacher, EMBEDDED[teacher]))
    small = ["iterations=1", "batch_size=4", "critic_steps=1", "images.workers=1", "log.samples_every=0"]
    done = run(["distill", "my.yaml", *small, "log.tracker=none", "--output", "run"])
    assert done.exit_code == 0, done.exception or done.output
    assert Path("run/student/model_index.json").is_file()


def unexplained(text: str) -> list[str]:
    """The settings above which no comment stands, sections and what is in the smoke section apart."""
    lines = text.splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"[a-z_]+:", line)]
    return [lines[number] for number in keys if not lines[number - 1].startswith("# ")]


def test_each_setting_has_a_reason_and_published_ones_their_source(uncounted: None) -> None:
    teacher = TEXT["sd15"][0](Path("sd15"))
    written(options(teacher, "prompts.txt", "24gb"))
    text = Path("my.yaml").read_text()
    assert unexplained(text) == []
    assert unexplained("# why\nteacher: digits\n\ndata: digits\n") == ["data: digits"]
    assert "as published: f-distill, arXiv 2502.15681, SD1.5 column" in text
    assert re.search(r"momentum: 0\.9  # 0\.9 and not 0, because 32 samples", text)
    assert "Your teacher is a StableDiffusionPipeline with a UNet2DConditionModel" in text
    assert "goal quality" in " ".join(text.replace("#", "").split())
    recipe = YAML(typ="safe", pure=True).load((Path(__file__).parents[2] / "configs/sd15-lora-24gb.yaml").read_text())
    assert set(recipe) <= set(YAML(typ="safe", pure=True).load(text))


@pytest.mark.parametrize(("name", "steps", "goal", "recipe"), at_night(ROWS, lambda row: row not in BY_DAY))
def test_a_text_to_image_teacher_gets_its_familys_recipe_which_dry_runs(
    name: str, steps: int, goal: str, recipe: str
) -> None:
    if name not in TEXT:
        pytest.skip(f"this version of diffusers has no pipeline for {name}")
    teacher = TEXT[name][0](Path("teacher"))
    config = written(options(teacher, "prompts.txt", "cpu", steps, goal))
    assert f"the recipe {recipe} (" in " ".join(Path("my.yaml").read_text().replace("#", "").split())
    assert unexplained(Path("my.yaml").read_text()) == []
    assert (config.student.steps or len(config.student_levels or (0,))) == steps
    assert bool(config.student.lora_rank) >= (goal == "lora")
    assert config.divergence in ("forward-kl", "jensen-shannon") or goal != "diversity"
    assert config.reuse_samples == (goal == "speed" and not config.stages)
    dry_run()


@pytest.mark.parametrize(("name", "recipe"), at_night(OTHER_ROWS, lambda row: row not in BY_DAY))
def test_other_families_dry_run_on_the_teachers_own_samples(name: str, recipe: str) -> None:
    teacher = FAMILIES[name][0](Path("teacher"))
    config = written(options(teacher, "teacher-samples"))
    assert f"the recipe {recipe}" in " ".join(Path("my.yaml").read_text().replace("#", "").split())
    assert config.data == "teacher-samples"
    dry_run()


@pytest.mark.thorough  # by day, tests/commands/test_recipes.py
def test_what_the_recipe_is_tried_out_with_still_runs() -> None:
    teacher = TEXT["sd15"][0](Path("teacher"))
    written(options(teacher, "prompts.txt", "cpu", 4, "lora"))
    done = run(["distill", "my.yaml", "--smoke", "iterations=1", "--output", "try"])
    assert done.exit_code == 0, done.exception or done.output


def images(folder: str, size: int, captions: bool) -> Path:
    path = Path(folder)
    path.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        sub = path if captions else path / str(number % 10)
        sub.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(sub / f"{number}.png")
        if captions:
            (sub / f"{number}.txt").write_text("a cat")
    return path


@pytest.mark.parametrize(("size", "recipe"), at_night([(8, "exact"), (11, "center-box")], lambda row: row[0] == 8))
def test_images_are_resized_if_they_have_to_be(tiny_teacher: Path, size: int, recipe: str) -> None:
    config = written(options(tiny_teacher, images("photos", size, captions=False)))
    assert config.images.recipe == recipe
    dry_run()


@pytest.mark.thorough  # by day, the commands of tests/commands/test_advice.py
def test_captioned_images_are_encoded_by_the_first_command(uncounted: None) -> None:
    teacher = TEXT["sd15"][0](Path("teacher"))
    done = run(options(teacher, images("photos", 20, captions=True), "24gb"))
    assert done.exit_code == 0, done.exception
    first = shlex.split(done.output.partition("Next:\n")[2].splitlines()[0])
    assert first[:3] == ["fdistill", "cache", "photos"]
    assert run([*first[1:], "--workers", "1", "--device", "cpu"]).exit_code == 0
    dry_run()
    for hardware in ("24gb", "cpu"):  # the same latents, in whose precision prompts have to be encoded
        config = written(options(teacher, "photos-latents", hardware), f"{hardware}.yaml")
        assert (config.data, config.frozen_precision) == ("photos-latents", "bf16")
        dry_run(f"{hardware}.yaml")


def test_a_file_with_its_pipeline(uncounted: None) -> None:
    pipeline = TEXT["sd15"][0](Path("teacher"))
    weights = shutil.copy(pipeline / "unet" / "diffusion_pytorch_model.safetensors", "mine.safetensors")
    assert "pass --base with the folder or hub id" in refusal(options(weights, "prompts.txt"))
    assert "leave --base out" in refusal([*options(pipeline, "prompts.txt"), "--base", "x/y"])
    config = written([*options(weights, "prompts.txt", "80gb"), "--base", str(pipeline)])
    assert (config.teacher, config.teacher_base) == ("mine.safetensors", "teacher")


def test_questions_are_asked_and_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "can_ask", lambda: True)
    done = run(["init"], "digit\ndigits\nnowhere\nteacher-samples\n24\ncpu\n9\n2\nlora\nfast\ndiversity\n")
    assert done.exit_code == 0, done.exception or done.output
    said = ["did you mean 'digits'", "no such file or folder", "expected cpu", "1 to 8", "LoRA files", "known: divers"]
    assert [words for words in said if words not in done.output] == []
    asked = [done.output.count(question[:40]) for name, question in command.QUESTIONS.items() if name != "base"]
    assert asked == [2, 2, 2, 2, 3]
    config = load_config("my.yaml")
    assert (config.data, config.student.steps, config.divergence) == ("teacher-samples", 2, "forward-kl")


def test_the_pipeline_of_a_file_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "can_ask", lambda: True)
    pipeline = TEXT["sd15"][0](Path("teacher"))
    shutil.copy(pipeline / "unet" / "diffusion_pytorch_model.safetensors", "mine.safetensors")
    done = run(["init", *options("", "prompts.txt")[3:]], "mine.safetensors\nteacher\n")
    assert done.exit_code == 0, done.exception or done.output
    assert load_config("my.yaml").teacher_base == "teacher"


def test_without_a_terminal_nothing_is_asked() -> None:
    arguments = [sys.executable, "-m", "fdistill", *options("digits", "digits")[:5]]
    done = subprocess.run(arguments, input="cpu\n", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: init: there is no terminal to ask on, and --hardware, --steps, --goal are missing"
    )
    assert not Path("my.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (options("owner/nothing", "digits"), "the hub gave no model of that id"),
        (options("digits", "digit-pairs"), "expected data like the teacher's"),
        (options("digits", "prompts.txt"), "takes no prompts; expected images, or teacher-samples"),
        (options("digits-t2i", "teacher-samples"), "expected a .txt file with one prompt a line"),
        (options("digits-t2i", "digits"), "has no captions"),
        (options("digits", "digits", "24 gigs"), "hardware: got '24 gigs'; expected cpu, the memory of a GPU"),
        (options("digits", "digits", "0gb"), "hardware: got '0gb'"),
        (options("digits", "digits", steps=0), "steps: got '0'; expected a whole number from 1 to 8"),
        (options("digits", "digits", goal="qualty"), "did you mean 'quality'"),
        (options("digits", "digits", goal="lora"), "expected one of quality, diversity, speed"),
        ([*options("digits", "digits"), "--output", "prompts.txt"], "is not overwritten; choose another name"),
    ],
)
def test_wrong_answers_are_refused(arguments: list[str], words: str) -> None:
    assert words in refusal(arguments)
    assert Path("prompts.txt").read_text().startswith("a cat")


def test_hardware_as_people_write_it() -> None:
    assert read_hardware("CPU") == Hardware(0, 0)
    assert read_hardware(" 24 GB ") == Hardware(1, 24)
    assert read_hardware("2x80gb") == read_hardware("2 x 80GB") == Hardware(2, 80)
    assert Hardware(1, 24).bytes == 22e9


def test_a_run_that_fits_is_counted() -> None:
    config = written(options("digits", "digits", "2x24gb"))
    text = " ".join(Path("my.yaml").read_text().split())
    assert re.search(r"Memory: An iteration needs 0\.\d+ GB of the 24 GB of each GPU", text)
    assert "accelerate launch --num_processes 2 -m fdistill distill my.yaml" in text
    assert config.batch_size == 128


@pytest.mark.thorough
def test_settings_make_a_run_fit_and_say_so() -> None:
    config = written(options("digits", "digits", "0.05gb"))
    changed = config.gradient_checkpointing or config.generator.micro_batch or config.precision == "bf16"
    assert changed
    assert "it makes the run fit" in Path("my.yaml").read_text().lower()
    plan = run(["plan", "my.yaml", "--memory", "0.05"])
    assert "It fits" in plan.output


def test_the_least_costly_remedy_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = [
        Remedy(("offload_frozen=true",), 5),
        Remedy(("student.lora_rank=64", "fake_score.lora_rank=64"), 7),
        Remedy(("frozen_precision=nf4",), 3),
    ]

    class Planned:
        class device:
            total = 30e9

        remedies = offered

    monkeypatch.setattr(fitting, "make_plan", lambda *_: Planned)
    draft = Draft.of("digits", {"teacher": "digits", "generator": {"lr": 1e-5}})
    fitting.fit(draft, Hardware(1, 24), print)
    assert draft.get("student.lora_rank") == draft.get("fake_score.lora_rank") == 64
    assert draft.get("generator.lr") == 5e-5
    Planned.remedies = []
    fitting.fit(draft, Hardware(1, 24), print)
    assert draft.memory.startswith("IT DOES NOT FIT: an iteration needs 30.0 GB of the 24 GB")


def test_what_cannot_be_counted_is_the_recipes_and_says_so(uncounted: None) -> None:
    written(options("digits-t2i", "prompts.txt", "2x80gb", 4, "speed"))
    text = " ".join(Path("my.yaml").read_text().replace("#", "").split())
    assert "It could not be counted (nothing was counted), so what concerns memory is the recipe's." in text
