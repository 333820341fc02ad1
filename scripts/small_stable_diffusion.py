"""A real StableDiffusionPipeline in small, for 16x16 images: how the embedded text-to-image teachers are trained.

A tokenizer that knows the words of the captions, a VAE, and a CLIP text encoder trained together with a
UNet2DConditionModel that predicts v. Of `train_digits_t2i.py` and `train_digit_pairs.py`.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from tqdm import trange
from transformers import CLIPTextConfig, CLIPTextModel

from fdistill.base.images import to_uint8
from fdistill.ema import EMA

SEED, BATCH, WARM_UP, EMA_DECAY = 0, 128, 100, 0.998
VAE_ITERATIONS, VAE_BATCH, VAE_RATE, KL_WEIGHT = 800, 64, 2e-3, 1e-4
RATE, PROMPT_DROPOUT, TEXT_WIDTH, MAX_TOKENS, DDIM_STEPS = 1.5e-3, 0.1, 64, 16, 25
START, END = "<|startoftext|>", "<|endoftext|>"


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


def assembled(vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> Any:
    """The pipeline of trained parts."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def parameters(pipeline: Any) -> dict[str, int]:
    """How many weights each part has."""
    parts = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "vae")}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


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
