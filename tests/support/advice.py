"""Commands that end in advice, and what to run instead; `tests/commands/test_advice.py` runs both."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from fdistill.commands.tiny_pipelines import tiny_pipeline
from fdistill.data.digit_captions import evaluation_prompts
from fdistill.networks import EDMNetwork
from support.denoisers import tiny_unet
from support.odd_files import FIRST_LAYOUT
from support.pickles import dumps, edm_content

TEXT = FIRST_LAYOUT / "lora" / "student"
RUN = FIRST_LAYOUT / "run"
STUDENT = RUN / "student"

Words = list[str]


def make_files(folder: Path, tiny_teacher: Path) -> None:
    """Writes everything that the rows below name after MADE."""
    draws = np.random.default_rng(0)
    for name, count, size in (("eight", 70, 8), ("few", 60, 8), ("nine", 70, 9), ("sixteen", 70, 16)):
        pixels = draws.integers(0, 256, (count, size, size), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=pixels, labels=np.arange(count) % 10)
        np.savez(folder / f"{name}-unlabelled.npz", images=pixels)
        for number, image in enumerate(pixels):
            path = folder / name / str(number % 10) / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    for number, prompt in enumerate(evaluation_prompts()[:70]):
        path = folder / "captioned" / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
        if number < 6:
            path.with_suffix(".txt").write_text(prompt.text)
    shutil.copytree(folder / "captioned", folder / "plain", ignore=shutil.ignore_patterns("*.txt"))
    for path in sorted((folder / "captioned").glob("*.png"))[6:]:
        path.unlink()
    (folder / "prompts.txt").write_text("".join(f"{prompt.text}\n" for prompt in evaluation_prompts()[:70]))
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"unet.{layer}.lora_A.weight": torch.ones(2, 8), f"unet.{layer}.lora_B.weight": torch.ones(8, 2)}
    save_file(lora, folder / "lora.safetensors")
    (folder / "no-smoke.yaml").write_text("iterations: 2\n")
    settings = {"img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_type": "SongUNet"}
    settings |= {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    network = EDMNetwork(**settings)
    (folder / "edm.pkl").write_bytes(dumps(edm_content(network, folder / "executed", **settings)))
    save_file(tiny_unet().state_dict(), folder / "unet.safetensors")
    torch.save({"net": tiny_unet().state_dict(), "fake_score": tiny_unet().state_dict()}, folder / "two.pth")
    averages = {name: tiny_unet().state_dict() for name in ("ema_9", "ema_99")}
    torch.save(averages, folder / "averages.pth")
    torch.save({"ema": tiny_unet().state_dict()}, folder / "misnamed.pkl")
    shutil.copy(folder / "misnamed.pkl", folder / "misnamed.pt")
    shutil.copytree(tiny_teacher, folder / "tiny")
    shutil.copytree(tiny_teacher, folder / "eleven", ignore=shutil.ignore_patterns("unet"))
    shutil.copytree(tiny_teacher, folder / "unconditional", ignore=shutil.ignore_patterns("unet"))
    tiny_unet(num_class_embeds=None).save_pretrained(folder / "unconditional" / "unet")
    tiny_unet(num_class_embeds=11).save_pretrained(folder / "eleven" / "unet")
    tiny_pipeline("StableDiffusionPipeline").save_pretrained(folder / "text")
    shutil.copytree(folder / "text", folder / "no-vae", ignore=shutil.ignore_patterns("vae"))


def dry(*settings: str) -> Words:
    return ["distill", "digits", "teacher=MADE/tiny", "device=cpu", "images.workers=1", *settings, "--dry-run"]


def text(*settings: str) -> Words:
    fixed = ("teacher=MADE/text", "method=diff-instruct", "student_level=999", "device=cpu", "images.workers=1")
    return ["distill", "digits", *fixed, *settings, "--dry-run"]


def init(*words: str) -> Words:
    return ["init", *words, "--hardware", "cpu", "--steps", "1", "--goal", "quality", "--output", "OUT.yaml"]


def evaluate(*words: str) -> Words:
    return ["evaluate", *words, "--replicates", "0", "--device", "cpu"]


ELEVEN = ("teacher=MADE/eleven", "null_class=10")
PROMPTED = text("data=null", "prompts=MADE/prompts.txt")
#: (a command, words of what it ends with, what to run instead). MADE is the folder above, OUT a new name.
ADVICE: list[tuple[Words, str, list[Words]]] = [
    (
        dry("condition_dropout=0.1"),
        "expected 0, or null_class set to that label",
        [dry("condition_dropout=0"), dry("condition_dropout=0.1", *ELEVEN)],
    ),
    (
        dry("guidance_scale=2"),
        "expected 1, null_class set to the teacher's label for it, or a second network as guidance_teacher",
        [
            dry("guidance_scale=1"),
            dry("guidance_scale=2", *ELEVEN),
            dry("guidance_scale=2", "guidance_teacher=MADE/tiny"),
        ],
    ),
    (
        dry("guidance_rescale=0.5"),
        "expected guidance_scale above 1",
        [dry("guidance_rescale=0.5", "guidance_scale=2", *ELEVEN), dry()],
    ),
    (dry("guidance_teacher=MADE/tiny"), "expected null", [dry("guidance_teacher=null")]),
    (
        dry("generator.gan_weight=0", "discriminator.gan_weight=0"),
        "expected discriminator.gan_weight > 0, or divergence=reverse-kl",
        [
            dry("generator.gan_weight=0"),
            dry("generator.gan_weight=0", "discriminator.gan_weight=0", "divergence=reverse-kl"),
        ],
    ),
    (dry("discriminator.features=[middle]"), "did you mean 'mid'", [dry("discriminator.features=[mid]")]),
    (
        dry("data=MADE/nine"),
        "choose a recipe that resamples: center-box",
        [dry("data=MADE/nine", f"images.recipe={name}") for name in ("center-box", "squash")],
    ),
    (
        dry("data=MADE/nine.npz"),
        "expected data like the teacher's, or images.recipe=center-box",
        [dry("data=MADE/eight.npz"), dry("data=MADE/nine.npz", "images.recipe=center-box")],
    ),
    (
        dry("data=MADE/eight-unlabelled.npz"),
        "expected class folders, or a dataset.json, labels or cls entry for each image",
        [dry("data=MADE/eight"), dry("data=MADE/eight.npz")],
    ),
    (
        dry("batch_size=8", "generator.micro_batch=3"),
        "expected a divisor, or null for all at once",
        [dry("batch_size=8", f"generator.micro_batch={size}") for size in ("4", "null")],
    ),
    (
        dry("clip_loss.gradient_ratio=0.1", "clip_loss.weights=a.safetensors"),
        "expected 0, or a text-to-image teacher",
        [dry("clip_loss.gradient_ratio=0")],
    ),
    (
        dry("reward.gradient_ratio=0.1", "reward.weights=a.pt"),
        "expected 0, or a text-to-image teacher",
        [dry("reward.gradient_ratio=0")],
    ),
    (dry("prompts=MADE/prompts.txt"), "expected null", [dry("prompts=null")]),
    (dry("resolution=16"), "expected null", [dry("resolution=null")]),
    (dry("teacher_base=MADE/text"), "expected null", [dry("teacher_base=null")]),
    (text("data=null"), "expected a file with one a line, or data of captioned images", [PROMPTED]),
    (
        text("data=teacher-samples", "resolution=17", "prompts=MADE/prompts.txt"),
        "expected a multiple of 2",
        [text("data=teacher-samples", "resolution=16", "prompts=MADE/prompts.txt")],
    ),
    (
        ["distill", "MADE/no-smoke.yaml", "--smoke", "--dry-run"],
        "leave --smoke out, or add one as in cifar10-cond",
        [["distill", "MADE/no-smoke.yaml", "--dry-run"], ["distill", "cifar10-cond", "--smoke", "--dry-run"]],
    ),
    (
        ["generate", "MADE/tiny", "--num-images", "1", "--steps", "1", "--prompt", "a"],
        "leave them out, or choose a text-to-image model",
        [
            ["generate", "MADE/tiny", "--num-images", "1", "--steps", "1"],
            ["generate", "MADE/text", "--num-images", "1", "--steps", "1", "--prompt", "a"],
        ],
    ),
    (
        ["generate", "MADE/text", "--num-images", "1", "--steps", "1"],
        "expected at least one prompt, and no class labels",
        [["generate", "MADE/text", "--num-images", "1", "--steps", "1", "--prompt", "a"]],
    ),
    (
        ["generate", "MADE/unconditional", "--num-images", "1", "--steps", "1", "--class-labels", "3"],
        "is unconditional; leave them out",
        [["generate", "MADE/unconditional", "--num-images", "1", "--steps", "1"]],
    ),
    (
        ["generate", "MADE/tiny", "--num-images", "1", "--steps", "1", "--output", "MADE/eight"],
        "exists and is not an empty folder; choose another",
        [["generate", "MADE/tiny", "--num-images", "1", "--steps", "1"]],
    ),
    (
        ["generate", str(STUDENT), "--num-images", "1", "--guidance-scale", "4"],
        "these were fixed in its training; leave it out",
        [["generate", str(STUDENT), "--num-images", "1"]],
    ),
    (
        ["generate", "MADE/tiny", "--num-images", "1", "--sampler", "pipeline", "--network", "a:b"],
        "leave one of the two out",
        [["generate", "MADE/tiny", "--num-images", "1", "--sampler", "pipeline"]],
    ),
    (
        ["generate", "MADE/edm.pkl", "--num-images", "1"],
        "`fdistill convert` makes one of a pickle",
        [["convert", "MADE/edm.pkl"]],
    ),
    (
        ["generate", "MADE/tiny", "--num-images", "0", "--steps", "1"],
        "expected at least 1",
        [["generate", "MADE/tiny", "--num-images", "1", "--steps", "1"]],
    ),
    (
        evaluate("MADE/plain", "--protocol", "digits-t2i", "--metrics", "prompt_accuracy"),
        "evaluate the student or teacher itself",
        [evaluate("digits-t2i", "--protocol", "digits-t2i", "--metrics", "prompt_accuracy", "--num-images", "24")],
    ),
    (
        evaluate("digits-t2i", "--protocol", "digits-t2i", "--prompts", "MADE/prompts.txt"),
        "which digits-t2i draws; leave them out",
        [
            evaluate(
                "digits-t2i",
                "--protocol",
                "digits-t2i",
                "--num-images",
                "9",
                "--steps",
                "1",
                "--metrics",
                "clip_digits",
            )
        ],
    ),
    (
        evaluate("MADE/eight-unlabelled.npz", "--metrics", "class_accuracy"),
        "in a manifest.json, in folder names or in an array",
        [evaluate(f"MADE/{name}", "--metrics", "class_accuracy") for name in ("eight", "eight.npz")],
    ),
    (
        evaluate("MADE/few", "--metrics", "fd_digits"),
        "expected at least 65, or other metrics",
        [evaluate("MADE/eight", "--metrics", "fd_digits"), evaluate("MADE/few", "--metrics", "class_accuracy")],
    ),
    (
        evaluate("MADE/eight", "--metrics", "fd_digits", "--seeds", "1"),
        "leave it out",
        [evaluate("MADE/eight", "--metrics", "fd_digits")],
    ),
    (
        evaluate("MADE/eight", "--metrics", "fd_digits", "--classifier", "a:b"),
        "has its own; leave it out",
        [evaluate("MADE/eight", "--metrics", "fd_digits")],
    ),
    (
        evaluate("MADE/sixteen", "--metrics", "fd_digits"),
        "bring them to that size first, or choose another protocol",
        [evaluate("MADE/plain", "--protocol", "digits-t2i", "--metrics", "fd_digits")],
    ),
    (
        ["reference", "MADE/few", "--output", "OUT.npz"],
        "pass more, or metrics that read single images, such as recall",
        [
            ["reference", "MADE/eight", "--output", "OUT.npz"],
            ["reference", "MADE/few", "--metrics", "recall", "--output", "OUT.npz"],
        ],
    ),
    (
        ["convert", "MADE/edm.pkl", "--family", "dit"],
        "says itself what it is; leave it out",
        [["convert", "MADE/edm.pkl"]],
    ),
    (
        ["convert", "MADE/unet.safetensors", "--like", "MADE/text", "--student-level", "none"],
        "is a text-to-image pipeline; pass it as base",
        [["convert", str(TEXT / "unet" / "diffusion_pytorch_model.safetensors"), "--base", "MADE/text"]],
    ),
    (
        ["convert", "MADE/unet.safetensors"],
        "or as like a checkpoint of the same architecture; and student_level",
        [
            ["convert", "MADE/unet.safetensors", "--like", "MADE/tiny", "--student-level", level]
            for level in ("none", "80")
        ],
    ),
    (
        ["convert", "MADE/two.pth", "--like", "MADE/tiny", "--student-level", "80", "--weights", "ema"],
        "holds net, fake_score",
        [["convert", "MADE/two.pth", "--like", "MADE/tiny", "--student-level", "80", "--weights", "net"]],
    ),
    (
        ["convert", "MADE/averages.pth", "--like", "MADE/tiny", "--student-level", "80"],
        "; pass the one that is meant",
        [
            ["convert", "MADE/averages.pth", "--like", "MADE/tiny", "--student-level", "80", "--weights", name]
            for name in ("ema_9", "ema_99")
        ],
    ),
    (
        ["convert", "MADE/misnamed.pkl"],
        "if it is a state dict, name it .pt",
        [["convert", "MADE/misnamed.pt", "--like", "MADE/tiny", "--student-level", "none"]],
    ),
    (
        ["export", str(TEXT), "--format", "zip", "--output", "OUT.safetensors"],
        "expected lora, comfy, comfy-lora",
        [
            ["export", str(TEXT), "--format", name, "--output", "OUT.safetensors"]
            for name in ("lora", "comfy", "comfy-lora")
        ],
    ),
    (
        ["export", str(TEXT), "--format", "lora", "--output", "OUT.bin"],
        "expected a file name that ends in .safetensors",
        [["export", str(TEXT), "--format", "lora", "--output", "OUT.safetensors"]],
    ),
    (
        ["cache", "MADE/eight", "--teacher", "MADE/tiny"],
        "pass the images to distill as they are",
        [dry("data=MADE/eight")],
    ),
    (
        ["cache", "MADE/plain", "--teacher", "MADE/text"],
        "expected photo.txt beside photo.jpg",
        [["cache", "MADE/captioned", "--teacher", "MADE/text", "--workers", "1"]],
    ),
    (
        text("data=null", "prompts=MADE/prompts.txt", "teacher=MADE/no-vae"),
        "or pass vae=FOLDER",
        [text("data=null", "prompts=MADE/prompts.txt", "teacher=MADE/no-vae", "vae=MADE/text")],
    ),
    (
        ["init", "--teacher", "digits", "--output", "OUT.yaml"],
        "missing; pass --teacher, --data, --hardware, --steps and --goal",
        [init("--teacher", "digits", "--data", "digits")],
    ),
    (
        [*init("--teacher", "digits", "--data", "digits")[:-1], "MADE/prompts.txt"],
        "is not overwritten; choose another name with --output",
        [init("--teacher", "digits", "--data", "digits")],
    ),
    (
        init("--teacher", "MADE/unet.safetensors", "--data", "MADE/prompts.txt"),
        "; pass --base with the folder or hub id of the pipeline",
        [init("--teacher", "MADE/unet.safetensors", "--base", "MADE/text", "--data", "MADE/prompts.txt")],
    ),
    (
        init("--teacher", "MADE/text", "--base", "MADE/text", "--data", "MADE/prompts.txt"),
        "is no file of weights; leave --base out",
        [init("--teacher", "MADE/text", "--data", "MADE/prompts.txt")],
    ),
    (
        ["ema", str(RUN), "--sigma-rel", "0.12", "--iteration", "9"],
        "the nearest is 3",
        [["ema", str(RUN), "--sigma-rel", "0.12", "--iteration", "3"]],
    ),
    (
        ["generate", "digit", "--num-images", "1"],
        "did you mean 'digits'",
        [["generate", "digits", "--num-images", "1", "--steps", "1"]],
    ),
]
