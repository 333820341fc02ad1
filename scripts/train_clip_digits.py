"""Train the embedded CLIP model of captioned digits (fdistill/assets/clip-digits): one seed, a few minutes of one core.

    python scripts/train_clip_digits.py [OUTPUT_DIR] [--iterations N] [--picture FILE.png]

An `open_clip.CLIP` in small, trained from scratch on four fifths of the images of fdistill/data/digit_captions.py. Ends
by loading the folder it has written with open_clip and measuring it on the other images and on digits-t2i's samples.
"""

import argparse
import json
import math
import platform
import shutil
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from small_stable_diffusion import draw, learning_rate, update
from torch import Tensor, nn
from tqdm import trange

from fdistill.assets import CLIP_DIGITS, EMBEDDED_TEACHERS
from fdistill.base.files import atomic_file, replaced_folder
from fdistill.base.images import to_uint8, to_unit
from fdistill.data.digit_captions import (
    DIGIT_WORDS,
    PLAIN,
    WEIGHT_WORDS,
    WEIGHTED,
    DigitPrompt,
    evaluation_prompts,
    load_captioned_digits,
    load_digit_images,
    true_prompts,
)

SEED, BATCH, RATE, WEIGHT_DECAY = 0, 128, 1.5e-3, 0.1
#: Fixed: a learned one grows, until pairs that match need only a little more cosine than those that do not.
LOGIT_SCALE = 10.0
NOISE, SHIFT, TEST_NOISE = 0.3, 1, 0.2
TOKENIZER = EMBEDDED_TEACHERS["digits-t2i"] / "tokenizer"

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 64, "layers": 3, "head_width": 16},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 567,
            # open_clip takes the tokenizer from the folder itself if there is any name here.
            "hf_tokenizer_name": "clip-digits",
            "width": 64,
            "heads": 4,
            "layers": 1,
        },
    },
    "preprocess_cfg": {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
}

CARD = """\
---
library_name: open_clip
license: apache-2.0
pipeline_tag: zero-shot-image-classification
---
# CLIP of captioned digits

A small CLIP model with {parameters:,} parameters. It tells which of two captions fits a picture of a
[digit](../digits/README.md) better. Its cosines are the scores named `clip_digits`; they are not CLIP scores.
open_clip (3.3) loads it without fdistill:

```python
import open_clip

model, preprocess = open_clip.create_model_from_pretrained("local-dir:fdistill/assets/clip-digits")
tokenizer = open_clip.get_tokenizer("local-dir:fdistill/assets/clip-digits")
```

- **Architecture** (`open_clip_config.json`): a vision transformer (3 layers of width 64, patches of 4x4 in images of
  16x16), a text transformer (1 layer of width 64), and {dim} features. The tokenizer is that of
  [digits-t2i](../digits-t2i/README.md).
- **Source**: the images and captions of `fdistill/data/digit_captions.py`. A caption names the digit in English; in
  five of eight phrasings it also says "bold" (more ink than the median of the digit's class) or "thin".
- **Trained on** {training_images:,} of the images; the other {held_out_images} are held out. Each batch contains all
  {captions} captions. Several captions are true of one image, and one caption is true of many images, so the targets of
  both softmaxes of CLIP's loss are uniform over the true ones. The logit scale is fixed at {scale:.0f}. Images are
  moved by up to one pixel and get Gaussian noise with a standard deviation of up to {noise} (pixels in [-1, 1]).
- **Made by** `python scripts/train_clip_digits.py` with seed {seed}: {iterations:,} iterations at batch {batch}, in
  {minutes:.1f} minutes of one CPU core ({machine}), {today}. The weights are in float16.
- **Scores** (`training.json`) are of the files here, loaded by open_clip in float32:

| on held-out images | as they are | with noise of 0.2 |
|---|---|---|
| right digit of ten, mean over 3 plain phrasings | {clean[digit_accuracy]:.1%} | {noisy[digit_accuracy]:.1%} |
| bold or thin of a known digit, mean over 5 phrasings | {clean[weight_accuracy]:.1%} | {noisy[weight_accuracy]:.1%} |
| right digit and weight of twenty, mean over 5 phrasings | {clean[both_accuracy]:.1%} | {noisy[both_accuracy]:.1%} |
| mean cosine with true captions | {clean[cosine_true]:.3f} | {noisy[cosine_true]:.3f} |
| ... with captions of the other weight | {clean[cosine_wrong_weight]:.3f} | {noisy[cosine_wrong_weight]:.3f} |
| ... with captions of other digits | {clean[cosine_wrong_digit]:.3f} | {noisy[cosine_wrong_digit]:.3f} |

| mean cosine with their prompts | right | shuffled |
|---|---|---|
| held-out images, a caption each | {pairs[held_out][0]:.3f} | {pairs[held_out][1]:.3f} |
| digits-t2i's 500 evaluation prompts, guidance 1 | {pairs[guidance_1][0]:.3f} | {pairs[guidance_1][1]:.3f} |
| digits-t2i's 500 evaluation prompts, guidance 2 | {pairs[guidance_2][0]:.3f} | {pairs[guidance_2][1]:.3f} |
| images of noise alone | {pairs[noise][0]:.3f} | {pairs[noise][1]:.3f} |

- **Limits**: about one image in {doubtful:.0f} is taken for bold when it is thin, or for thin when it is bold; these
  are the images near the median of ink. It knows only the words of the captions, and its scores mean little for images
  without a digit.
- **Licence**: Apache-2.0; the data is CC BY 4.0.
"""


def all_prompts() -> list[DigitPrompt]:
    """The 130 captions: those that name no weight are true of both weights and come once."""
    return list(dict.fromkeys(p for digit in range(10) for weight in WEIGHT_WORDS for p in true_prompts(digit, weight)))


def held_out_images(count: int) -> Tensor:
    """bool [count]: every fifth of the images in a random order, the same at each call."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.from_numpy(np.random.default_rng(SEED).permutation(count)[: count // 5])] = True
    return mask


def is_true(prompts: list[DigitPrompt], labels: Tensor, bold: Tensor) -> tuple[Tensor, Tensor]:
    """bool [N, P] twice: whether a caption names the image's digit, and whether its weight word, if any, is right."""
    digits = torch.tensor([p.digit for p in prompts])
    weights = torch.tensor([[p.weight in (word, None) for p in prompts] for word in WEIGHT_WORDS])
    return labels[:, None] == digits, weights[bold.long()]


def augment(x: Tensor) -> Tensor:
    """Each image [3, 16, 16] moved by up to SHIFT pixels, with noise of its own strength."""
    padded = F.pad(x, (SHIFT,) * 4, value=-1.0)
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, len(x))).tolist()
    moved = torch.stack([p[:, i : i + 16, j : j + 16] for p, i, j in zip(padded, top, left, strict=True)])
    return moved + NOISE * torch.rand(len(x), 1, 1, 1) * torch.randn_like(moved)


def cross_entropy_of_several(logits: Tensor, true: Tensor) -> Tensor:
    """Mean cross entropy of the rows [R, C], targets uniform over the true columns; rows without any are left out."""
    rows = true.any(1)
    targets = true[rows].float()
    return F.cross_entropy(logits[rows], targets / targets.sum(1, keepdim=True))


def train(x: Tensor, tokens: Tensor, true: Tensor, iterations: int) -> open_clip.CLIP:
    """x float32 [N, 3, 16, 16] in [-1, 1], tokens int64 [P, 16], true bool [N, P] -> the model."""
    model = open_clip.CLIP(**CONFIG["model_cfg"], init_logit_scale=math.log(LOGIT_SCALE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    progress = trange(iterations, desc="CLIP", unit="it", mininterval=5)
    for step in progress:
        rows = torch.randint(len(x), (BATCH,))
        image = model.encode_image(augment(x[rows]), normalize=True)
        logits = LOGIT_SCALE * image @ model.encode_text(tokens, normalize=True).T
        loss = (cross_entropy_of_several(logits, true[rows]) + cross_entropy_of_several(logits.T, true[rows].T)) / 2
        update(optimizer, loss, learning_rate(step, iterations, RATE))
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model


def save(model: nn.Module, folder: Path) -> None:
    """The folder that open_clip's "local-dir:" reads: config, weights in float16, tokenizer."""
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    (folder / "open_clip_model.safetensors").chmod(0o644)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)


class Cosines:
    """What open_clip makes of a folder, one image at a time through the transform that the folder's config asks for."""

    def __init__(self, folder: Path) -> None:
        self.model, self.preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: list[str]) -> Tensor:
        """images uint8 [N, 3, H, W], P texts -> cosines [N, P]."""
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        image = self.model.encode_image(torch.stack([self.preprocess(p) for p in pictures]), normalize=True)
        text = self.model.encode_text(self.tokenizer(texts), normalize=True)
        cosines: Tensor = image @ text.T
        return cosines


def measure(cosines: Tensor, prompts: list[DigitPrompt], labels: Tensor, bold: Tensor) -> dict[str, float]:
    """Scores from the cosines [N, P] of images with all prompts."""
    column = {p.text: k for k, p in enumerate(prompts)}

    def of_phrasing(phrase: str, **words: str) -> Tensor:
        """[N, 10], the cosines with this phrasing of each digit."""
        return cosines[:, [column[phrase.format(digit=digit, **words)] for digit in DIGIT_WORDS]]

    plain = torch.stack([of_phrasing(phrase) for phrase in PLAIN])
    weighted = torch.stack(
        [torch.stack([of_phrasing(phrase, weight=word) for word in WEIGHT_WORDS], -1) for phrase in WEIGHTED]
    )
    of_right_digit = weighted[:, torch.arange(len(labels)), labels]
    right_digit, right_weight = is_true(prompts, labels, bold)
    scores = {
        "digit_accuracy": plain.argmax(2) == labels,
        "weight_accuracy": of_right_digit.argmax(2) == bold.long(),
        "both_accuracy": weighted.flatten(2).argmax(2) == 2 * labels + bold.long(),
        "cosine_true": cosines[right_digit & right_weight],
        "cosine_wrong_weight": cosines[right_digit & ~right_weight],
        "cosine_wrong_digit": cosines[~right_digit],
    }
    return {name: round(values.double().mean().item(), 4) for name, values in scores.items()}


def with_prompts(cosines: Cosines, images: Tensor, prompts: list[DigitPrompt]) -> tuple[float, float]:
    """Mean cosine of images with their own prompts, and with the same prompts in a random order."""
    matrix = cosines(images, [p.text for p in prompts])
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(SEED))
    shuffled = matrix[torch.arange(len(prompts)), order]
    return round(matrix.diagonal().mean().item(), 4), round(shuffled.mean().item(), 4)


def draw_similarities(cosines: Tensor, labels: Tensor, bold: Tensor, file: Path) -> None:
    """cosines [N, 20] with "a WEIGHT DIGIT", thin zero first -> a picture of their means over images of each kind."""
    means = torch.stack(
        [cosines[(labels == digit) & (bold == weight)].mean(0) for digit in range(10) for weight in (0, 1)]
    )
    names = [f"{weight} {digit}" for digit in DIGIT_WORDS for weight in WEIGHT_WORDS]
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(means, cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_xticks(range(20), [f"a {name}" for name in names], rotation=90)
    axes.set_yticks(range(20), names)
    axes.set_xlabel("prompt")
    axes.set_ylabel("held-out images")
    figure.colorbar(drawn, label="mean cosine")
    with atomic_file(file) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def card(result: dict[str, Any]) -> str:
    return CARD.format(
        clean=result["held_out"],
        noisy=result["held_out_with_noise"],
        pairs=result["with_their_prompts_and_shuffled"],
        dim=CONFIG["model_cfg"]["embed_dim"],
        scale=LOGIT_SCALE,
        noise=NOISE,
        seed=SEED,
        batch=BATCH,
        minutes=result["training_cpu_minutes"],
        machine=platform.machine(),
        today=date.today(),
        doubtful=1 / (1 - result["held_out"]["weight_accuracy"]),
        **{
            name: result[name]
            for name in ("parameters", "training_images", "held_out_images", "captions", "iterations")
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=CLIP_DIGITS)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--picture", type=Path, help="where to draw mean cosines of prompts and kinds of images")
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    images, labels, bold = load_digit_images()
    test = held_out_images(len(images))
    prompts = all_prompts()
    texts = [p.text for p in prompts]
    right_digit, right_weight = is_true(prompts, labels, bold)
    tokens = open_clip.tokenizer.HFTokenizer(TOKENIZER, context_length=16)(texts)
    start = time.process_time()
    model = train(to_unit(images[~test]), tokens, (right_digit & right_weight)[~test], arguments.iterations)
    minutes = (time.process_time() - start) / 60

    with replaced_folder(arguments.output) as folder:
        save(model, folder)
        cosines = Cosines(folder)
        unseen, truth = images[test], (labels[test], bold[test])
        noisy = to_uint8(to_unit(unseen) + TEST_NOISE * torch.randn(unseen.shape))
        captions = [caption for caption, kept in zip(load_captioned_digits()[1], test, strict=True) if kept]
        asked = evaluation_prompts()
        teacher = DiffusionPipeline.from_pretrained(EMBEDDED_TEACHERS["digits-t2i"])
        samples = {f"guidance_{scale}": draw(teacher, [p.text for p in asked], scale) for scale in (1, 2)}
        samples["noise"] = to_uint8(torch.randn(len(asked), 3, 16, 16))
        result = {
            "held_out": measure(cosines(unseen, texts), prompts, *truth),
            "held_out_with_noise": measure(cosines(noisy, texts), prompts, *truth),
            "with_their_prompts_and_shuffled": {
                "held_out": with_prompts(cosines, unseen, captions),
                **{name: with_prompts(cosines, x, asked) for name, x in samples.items()},
            },
            "parameters": sum(p.numel() for p in model.parameters()),
            "training_images": int((~test).sum()),
            "held_out_images": int(test.sum()),
            "captions": len(prompts),
            "iterations": arguments.iterations,
            "training_cpu_minutes": round(minutes, 1),
            "seed": SEED,
        }
        (folder / "training.json").write_text(json.dumps(result, indent=2) + "\n")
        (folder / "README.md").write_text(card(result))
    if arguments.picture:
        named = [f"a {weight} {digit}" for digit in DIGIT_WORDS for weight in WEIGHT_WORDS]
        draw_similarities(cosines(unseen, named), *truth, arguments.picture)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
