"""Train the embedded text-to-image teacher (fdistill/assets/digits-t2i): one seed, under half an hour of one CPU core.

    python scripts/train_digits_t2i.py [OUTPUT_DIR] [--iterations N]

A real StableDiffusionPipeline in small: a tokenizer that knows the words of the captions, a VAE, and a CLIP text
encoder trained together with a UNet2DConditionModel that predicts v. Ends by drawing 500 prompts with the folder it has
written and prints how many of the digits are the ones asked for.
"""

import argparse
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from tqdm import trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from evaluation.extractors.digit_features import extract, load_digit_features
from evaluation.metrics.frechet import frechet_distance
from evaluation.metrics.moments import Moments
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.files import replaced_folder
from fdistill.base.images import to_uint8, to_unit
from fdistill.data.digit_captions import (
    WEIGHT_WORDS,
    DigitPrompt,
    as_digits,
    digit_ink,
    evaluation_prompts,
    load_digit_images,
    true_prompts,
)
from fdistill.ema import EMA

SEED, BATCH, WARM_UP, EMA_DECAY = 0, 128, 100, 0.998
VAE_ITERATIONS, VAE_BATCH, VAE_RATE, KL_WEIGHT = 800, 64, 2e-3, 1e-4
RATE, PROMPT_DROPOUT, TEXT_WIDTH, MAX_TOKENS, DDIM_STEPS = 1.5e-3, 0.1, 64, 16, 25
START, END = "<|startoftext|>", "<|endoftext|>"


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


def words_of(captions: Iterable[list[str]]) -> Counter[str]:
    """How often each word stands in these captions."""
    return Counter(word for texts in captions for text in texts for word in text.split())


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016), most frequent pair first, until every word is one token."""
    splits = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in splits.values()):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in splits.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        best = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(best)
        for word, parts in splits.items():
            merged: list[str] = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            splits[word] = merged
    return merges


def write_tokenizer(folder: Path, words: Counter[str]) -> None:
    """The files of a CLIPTokenizer: all 256 bytes, also at the end of a word, so that any text can be written."""
    folder.mkdir()
    symbols = sorted(ByteLevel.alphabet())
    merges = learn_merges(words)
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), START, END]
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True, **special}
    files = {
        "vocab.json": json.dumps({token: index for index, token in enumerate(vocabulary)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges)]),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(special, indent=2),
    }
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")


def learning_rate(step: int, iterations: int, peak: float) -> float:
    return peak * min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / iterations))


def update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One step at this learning rate, gradients clipped to length 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def train_vae(x: Tensor) -> Any:
    """x [N, 3, 16, 16] in [-1, 1] -> an AutoencoderKL whose latents [4, 8, 8] have mean 0 in each channel."""
    vae = AutoencoderKL(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE)
    for step in trange(VAE_ITERATIONS, desc="VAE", unit="it", mininterval=5):
        batch = x[torch.randint(len(x), (VAE_BATCH,))]
        posterior = vae.encode(batch).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, batch)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        update(optimizer, error + KL_WEIGHT * divergence, learning_rate(step, VAE_ITERATIONS, VAE_RATE))
    vae.eval().requires_grad_(False)
    latents = vae.encode(x).latent_dist.sample()
    means = latents.mean((0, 2, 3))
    vae.quant_conv.bias[:4] -= means
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ means
    vae.register_to_config(scaling_factor=round(1 / latents.sub(means[:, None, None]).std().item(), 5))
    return vae


def build(tokenizer: Any) -> tuple[Any, Any, Any]:
    """(text encoder, UNet, scheduler), untrained; the noise schedule is Stable Diffusion's."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 80),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    return text_encoder, unet, scheduler


@dataclass(frozen=True)
class Captioned:
    """What the UNet is trained on: scaled latents as normal distributions, and token ids.

    Attributes:
        mean, std: float32 [N, 4, 8, 8].
        captions: int64 [N, P, MAX_TOKENS], the P captions that are true of each image.
        empty: int64 [1, MAX_TOKENS], the empty prompt.
    """

    mean: Tensor
    std: Tensor
    captions: Tensor
    empty: Tensor


def token_ids(tokenizer: Any, texts: list[str]) -> Tensor:
    ids: Tensor = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    return ids


def train(models: nn.ModuleDict, scheduler: Any, data: Captioned, iterations: int) -> EMA:
    """Trains text encoder and UNet together."""
    optimizer = torch.optim.AdamW(models.parameters(), lr=RATE, weight_decay=1e-2)
    ema = EMA(models, [EMA_DECAY])
    progress = trange(iterations, desc="text encoder and UNet", unit="it", mininterval=5)
    for step in progress:
        rows = torch.randint(len(data.mean), (BATCH,))
        x0 = data.mean[rows] + data.std[rows] * torch.randn(BATCH, *data.mean.shape[1:])
        captions = data.captions[rows, torch.randint(data.captions.shape[1], (BATCH,))]
        captions = torch.where(torch.rand(BATCH, 1) < PROMPT_DROPOUT, data.empty, captions)
        timesteps, noise = torch.randint(1000, (BATCH,)), torch.randn_like(x0)
        x_t, v = scheduler.add_noise(x0, noise, timesteps), scheduler.get_velocity(x0, noise, timesteps)
        states = models["text_encoder"](captions).last_hidden_state
        loss = F.mse_loss(models["unet"](x_t, timesteps, states).sample, v)
        update(optimizer, loss, learning_rate(step, iterations, RATE))
        ema.update()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return ema


def rewrite_weights(file: Path, prefix: str = "") -> None:
    """In float16, names starting with `prefix`, readable by everybody."""
    save_file({prefix + name: value.half() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    file.chmod(0o644)


def save(pipeline: Any, folder: Path, words: Counter[str]) -> None:
    """Writes the pipeline so that transformers 4 and 5 both read it; its tokenizer knows these words."""
    pipeline.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer", words)
    for part in ("unet", "vae"):
        rewrite_weights(folder / part / "diffusion_pytorch_model.safetensors")
    # transformers 5 leaves this prefix out; without it transformers 4 keeps the text encoder's random weights.
    rewrite_weights(folder / "text_encoder" / "model.safetensors", prefix="text_model.")


def draw(pipeline: Any, prompts: list[str], guidance: float) -> Tensor:
    """One image for each prompt, uint8 [N, 3, 16, 16], by the pipeline itself; the same noise at every call."""
    generator = torch.Generator().manual_seed(SEED)
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(
            prompts[k : k + 125],
            num_inference_steps=DDIM_STEPS,
            guidance_scale=guidance,
            generator=generator,
            output_type="pt",
        ).images
        for k in range(0, len(prompts), 125)
    ]
    return to_uint8(torch.cat(images) * 2 - 1)


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
        trained = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder.eval(),
            tokenizer=tokenizer,
            unet=unet.eval(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
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
            "parameters": {
                name: sum(p.numel() for p in getattr(trained, name).parameters())
                for name in ("unet", "text_encoder", "vae")
            },
        }
        (folder / "training.json").write_text(json.dumps(result, indent=2) + "\n")
        (folder / "README.md").write_text(card(result))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
