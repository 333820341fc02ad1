"""Train the embedded text-to-image teacher (fdistill/assets/digits-t2i): one seed, under half an hour of one CPU core.

    python scripts/train_digits_t2i.py [OUTPUT_DIR] [--iterations N]

A real StableDiffusionPipeline in small: a tokenizer that knows the words of the captions, a VAE, and a CLIP text
encoder trained together with a UNet2DConditionModel that predicts v. Ends by drawing 500 prompts with the folder it has
written and prints how many of the digits are the ones asked for.
"""

import argparse
import json
import math
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from small_stable_diffusion import (
    BATCH,
    DDIM_STEPS,
    EMA_DECAY,
    SEED,
    VAE_ITERATIONS,
    Captioned,
    assembled,
    build,
    draw,
    parameters,
    save,
    token_ids,
    train,
    train_vae,
    words_of,
    write_tokenizer,
)
from torch import Tensor, nn
from transformers import CLIPTokenizer

from evaluation.extractors.digit_features import extract, load_digit_features
from evaluation.metrics.frechet import frechet_distance
from evaluation.metrics.moments import Moments
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.files import replaced_folder
from fdistill.base.images import to_unit
from fdistill.data.digit_captions import (
    WEIGHT_WORDS,
    DigitPrompt,
    as_digits,
    digit_ink,
    evaluation_prompts,
    load_digit_images,
    true_prompts,
)

CARD = """\
---
library_name: diffusers
license: apache-2.0
pipeline_tag: text-to-image
---
# Digits text-to-image teacher

A small Stable Diffusion with {parameters:.1f} M parameters. It draws the [digits](../digits/README.md) that a prompt
asks for, as 16x16 images. Its parts are a `CLIPTokenizer` with {tokens} tokens, a CLIP text encoder (2 layers of width
64), an `AutoencoderKL` (latents of 4x8x8) and a `UNet2DConditionModel` (48 and 80 channels) that predicts v on Stable
Diffusion's noise schedule. diffusers runs it without fdistill:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("fdistill/assets/digits-t2i")
image = pipeline("a bold handwritten seven", num_inference_steps=25, guidance_scale=2).images[0]
```

The captions (`fdistill/data/digit_captions.py`) name the digit in English. Some also say "bold" (more ink than the
median of the digit's class) or "thin". In training, one prompt in ten was replaced by the empty prompt, for
classifier-free guidance.

- **Made by** `python scripts/train_digits_t2i.py` with seed {seed}: {vae_iterations:,} iterations of the VAE, then
  {iterations:,} of text encoder and UNet at batch {batch}. This took {minutes:.0f} minutes of one CPU core, {today}.
- **Weights** are averages (decay {decay}) in float16. Rounding to float16 changes no pixel of the images by more than
  {rounding} of 255.
- **Scores** are of {samples} prompts, {per_digit} for each digit, with {steps} DDIM steps (`training.json`). The
  [digit feature network](../digits-features/README.md) recognises the digits. Distances are medians over 8x8 pixels in
  [-1, 1].

| | guidance 1 | guidance 2 |
|---|---|---|
| images that show the digit of the prompt | {plain[accuracy]:.1%} | {guided[accuracy]:.1%} |
| mean ink, prompts with "bold" | {plain[ink_bold]:.3f} | {guided[ink_bold]:.3f} |
| mean ink, prompts with "thin" | {plain[ink_thin]:.3f} | {guided[ink_thin]:.3f} |
| fd_digits@500 against the training images | {plain[fd_digits]:.2f} | {guided[fd_digits]:.2f} |
| distance to the nearest training image | {plain[nearest_training_image]:.2f} | {guided[nearest_training_image]:.2f} |

- **Does it memorise?** 1 % of the samples are within {plain[nearest_training_image_1_percent]:.2f} of a training image
  at guidance 1, and within {guided[nearest_training_image_1_percent]:.2f} at guidance 2. From one training image to the
  nearest other one, 1 % are within {real[nearest_training_image_1_percent]:.2f} and the median is
  {real[nearest_training_image]:.2f}. So samples are about as far from the training images as those are from one
  another.
- **Licence**: Apache-2.0; the data is CC BY 4.0.
"""


def all_captions() -> list[list[str]]:
    """The true captions of each digit and weight: thin zeros, bold zeros, thin ones and so on."""
    return [[p.text for p in true_prompts(digit, weight)] for digit in range(10) for weight in WEIGHT_WORDS]


def caption_words() -> Counter[str]:
    return words_of(all_captions())


def measure(samples: Tensor, prompts: list[DigitPrompt], training_images: Tensor) -> dict[str, float]:
    """Scores of one sample for each prompt."""
    network = load_digit_features()
    features, classes = extract(network, as_digits(samples))
    distance = frechet_distance(Moments.of(features), Moments.of(extract(network, as_digits(training_images))[0]))
    ink = {weight: digit_ink(samples[[p.weight == weight for p in prompts]]).mean().item() for weight in WEIGHT_WORDS}
    real, drawn = (to_unit(as_digits(x)).flatten(1) for x in (training_images, samples))
    return {
        "accuracy": (classes == torch.tensor([p.digit for p in prompts])).double().mean().item(),
        "ink_bold": round(ink["bold"], 3),
        "ink_thin": round(ink["thin"], 3),
        "fd_digits": round(distance, 2),
        **nearest(torch.cdist(drawn, real)),
    }


def nearest(distances: Tensor) -> dict[str, float]:
    """Of the distances from each row to the nearest column, the median and the 1 % quantile."""
    smallest = distances.amin(1)
    return {
        "nearest_training_image": round(smallest.median().item(), 2),
        "nearest_training_image_1_percent": round(smallest.quantile(0.01).item(), 2),
    }


def among(images: Tensor) -> Tensor:
    """Distances [N, N] between digits, infinite from each to itself."""
    x = to_unit(as_digits(images)).flatten(1)
    return torch.cdist(x, x).fill_diagonal_(math.inf)


def card(result: dict[str, Any]) -> str:
    return CARD.format(
        plain=result["guidance_1"],
        guided=result["guidance_2"],
        parameters=sum(result["parameters"].values()) / 1e6,
        tokens=result["tokens"],
        seed=SEED,
        vae_iterations=VAE_ITERATIONS,
        iterations=result["iterations"],
        batch=BATCH,
        minutes=result["training_cpu_minutes"],
        today=date.today(),
        decay=EMA_DECAY,
        rounding=result["largest_change_by_float16"],
        samples=result["samples"],
        per_digit=result["samples"] // 10,
        steps=DDIM_STEPS,
        real=result["training_images"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=EMBEDDED_TEACHERS["digits-t2i"])
    parser.add_argument("--iterations", type=int, default=2500)
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    start = time.perf_counter(), time.process_time()
    images, labels, bold = load_digit_images()
    x = to_unit(images)
    vae = train_vae(x)
    posterior = vae.encode(x).latent_dist
    captions = all_captions()
    with replaced_folder(arguments.output) as folder:
        write_tokenizer(folder / "tokenizer", caption_words())
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        text_encoder, unet, scheduler = build(tokenizer)
        models = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
        data = Captioned(
            mean=posterior.mean * vae.config.scaling_factor,
            std=posterior.std * vae.config.scaling_factor,
            captions=torch.stack([token_ids(tokenizer, texts) for texts in captions])[2 * labels + bold.long()],
            empty=token_ids(tokenizer, [""]),
        )
        ema = train(models, scheduler, data, arguments.iterations)
        end = time.perf_counter(), time.process_time()
        models.load_state_dict(ema.shadows[EMA_DECAY])
        trained = assembled(vae, text_encoder, tokenizer, unet, scheduler)
        save(trained, folder, caption_words())
        pipeline = DiffusionPipeline.from_pretrained(folder)
        prompts = evaluation_prompts()
        samples = {scale: draw(pipeline, [p.text for p in prompts], scale) for scale in (1, 2)}
        exact = draw(trained, [p.text for p in prompts], 1)
        result = {
            **{f"guidance_{scale}": measure(drawn, prompts, images) for scale, drawn in samples.items()},
            "samples": len(prompts),
            "ddim_steps": DDIM_STEPS,
            "training_images": nearest(among(images)),
            "vae_squared_error": round(F.mse_loss(vae.decode(posterior.mean).sample, x).item(), 5),
            "largest_change_by_float16": (exact.int() - samples[1].int()).abs().max().item(),
            "iterations": arguments.iterations,
            "batch_size": BATCH,
            "training_minutes": round((end[0] - start[0]) / 60, 1),
            "training_cpu_minutes": round((end[1] - start[1]) / 60, 1),
            "tokens": len(tokenizer),
            "parameters": parameters(trained),
        }
        (folder / "training.json").write_text(json.dumps(result, indent=2) + "\n")
        (folder / "README.md").write_text(card(result))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
