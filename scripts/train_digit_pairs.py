"""Train the second embedded text-to-image teacher (fdistill/assets/digit-pairs): one seed, an hour of one CPU core.

    python scripts/train_digit_pairs.py [OUTPUT_DIR] [--iterations N]

Two digits in an image, and captions that say which is left of which (`fdistill/data/digit_pairs.py`); the networks are
those of small_stable_diffusion.py. Ends by drawing 500 prompts with the folder it has written and prints how many of
the images have both digits in their places, and how many have them exchanged.
"""

import argparse
import json
import time
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import small_stable_diffusion as small
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from evaluation.extractors.digit_features import extract, load_digit_features
from evaluation.metrics.frechet import frechet_distance
from evaluation.metrics.moments import Moments
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.files import replaced_folder
from fdistill.base.images import to_unit
from fdistill.data.digit_pairs import PairPrompt, halves, load_digit_pairs, pair_evaluation_prompts, true_pair_prompts

CARD = """\
---
library_name: diffusers
license: apache-2.0
pipeline_tag: text-to-image
---
# Digit pairs text-to-image teacher

A small Stable Diffusion with {parameters:.1f} M parameters. It draws two [digits](../digits/README.md) beside each
other, as 16x16 images, and the prompt says which is where: "three left of seven", "the seven is right of the three".
Its parts are those of [digits-t2i](../digits-t2i/README.md). diffusers runs it without fdistill:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("fdistill/assets/digit-pairs")
image = pipeline("three left of seven", num_inference_steps=25, guidance_scale=2).images[0]
```

- **Made by** `python scripts/train_digit_pairs.py` with seed {seed}: {vae_iterations:,} iterations of the VAE, then
  {iterations:,} of text encoder and UNet at batch {batch}. This took {minutes:.0f} minutes of one CPU core, {today}. In
  training, one prompt in ten was replaced by the empty prompt, for classifier-free guidance.
- **Weights** are averages (decay {decay}) in float16.
- **Scores** are of {samples} prompts, {per_pair} for each pair, with {steps} DDIM steps (`training.json`). The
  [digit feature network](../digits-features/README.md) recognises the digits of both halves.

| | guidance 1 | guidance 2 |
|---|---|---|
| images with both digits of the prompt in their places | {plain[pair_accuracy]:.1%} | {guided[pair_accuracy]:.1%} |
| images with both digits in each other's place | {plain[exchanged]:.1%} | {guided[exchanged]:.1%} |
| fd_pairs@500 against the training images | {plain[fd_pairs]:.2f} | {guided[fd_pairs]:.2f} |

- **Licence**: Apache-2.0; the data is CC BY 4.0.
"""


def measure(samples: Tensor, prompts: list[PairPrompt], training_images: Tensor) -> dict[str, float]:
    """Scores of one sample for each prompt."""
    network = load_digit_features()
    features, classes = [], []
    for images in (samples, training_images):
        found, read = extract(network, halves(images).flatten(0, 1)[:, None])
        features.append(found.reshape(len(images), -1))
        classes.append(read.reshape(len(images), 2))
    asked = torch.tensor([(prompt.left, prompt.right) for prompt in prompts])
    right, turned = (classes[0] == asked).all(1), (classes[0] == asked.flip(1)).all(1) & (asked[:, 0] != asked[:, 1])
    return {
        "pair_accuracy": right.double().mean().item(),
        "exchanged": turned.double().mean().item(),
        "fd_pairs": round(frechet_distance(*(Moments.of(each) for each in features)), 2),
    }


def card(result: dict[str, Any]) -> str:
    return CARD.format(
        plain=result["guidance_1"],
        guided=result["guidance_2"],
        parameters=sum(result["parameters"].values()) / 1e6,
        seed=small.SEED,
        vae_iterations=small.VAE_ITERATIONS,
        iterations=result["iterations"],
        batch=small.BATCH,
        minutes=result["training_cpu_minutes"],
        today=date.today(),
        decay=small.EMA_DECAY,
        samples=result["samples"],
        per_pair=result["samples"] // 100,
        steps=small.DDIM_STEPS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=EMBEDDED_TEACHERS["digit-pairs"])
    parser.add_argument("--iterations", type=int, default=4000)
    arguments = parser.parse_args()

    torch.manual_seed(small.SEED)
    start = time.process_time()
    images, pairs, _ = load_digit_pairs()
    vae = small.train_vae(to_unit(images))
    with torch.no_grad():
        posterior = vae.encode(to_unit(images)).latent_dist
    captions = [[p.text for p in true_pair_prompts(*pair)] for pair in product(range(10), repeat=2)]
    words = small.words_of(captions)
    with replaced_folder(arguments.output) as folder:
        small.write_tokenizer(folder / "tokenizer", words)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        text_encoder, unet, scheduler = small.build(tokenizer)
        models = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
        ids = torch.stack([small.token_ids(tokenizer, texts) for texts in captions])
        data = small.Captioned(
            mean=posterior.mean * vae.config.scaling_factor,
            std=posterior.std * vae.config.scaling_factor,
            captions=ids[10 * pairs[:, 0] + pairs[:, 1]],
            empty=small.token_ids(tokenizer, [""]),
        )
        ema = small.train(models, scheduler, data, arguments.iterations)
        minutes = (time.process_time() - start) / 60
        models.load_state_dict(ema.shadows[small.EMA_DECAY])
        trained = small.assembled(vae, text_encoder, tokenizer, unet, scheduler)
        small.save(trained, folder, words)
        pipeline = DiffusionPipeline.from_pretrained(folder)
        prompts = pair_evaluation_prompts()
        samples = {scale: small.draw(pipeline, [p.text for p in prompts], scale) for scale in (1, 2)}
        result = {
            **{f"guidance_{scale}": measure(drawn, prompts, images) for scale, drawn in samples.items()},
            "samples": len(prompts),
            "ddim_steps": small.DDIM_STEPS,
            "iterations": arguments.iterations,
            "batch_size": small.BATCH,
            "training_cpu_minutes": round(minutes, 1),
            "tokens": len(tokenizer),
            "parameters": small.parameters(trained),
        }
        (folder / "training.json").write_text(json.dumps(result, indent=2) + "\n")
        (folder / "README.md").write_text(card(result))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
