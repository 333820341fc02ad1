"""How much of T - F, the difference of teacher and fake score in x0, is rounding in bf16, as a Markdown table by level.

python scripts/measure_rounding.py [--minutes 1.5] [--out FILE]

For each row of CASES a UNet2DModel learns to denoise all digits that come with the package (the teacher T), and a copy
of it then learns those of classes 0 to 4 alone (the fake score F, of a student that makes these). Both are evaluated in
float32 and in bf16 at the same noised digits of classes 0 to 4. The share that is rounding is |d' - d|^2 / |d'|^2, with
d the T - F of float32 and d' that of bf16. GroupNorm runs in float32, as in autocast on a GPU, not as on a CPU. The
ideal T - F is that of the exact denoisers of the two sets of images: what both networks would have learnt in the end.
A second table has that share for every precision of the teacher's weights. A third is of the embedded text-to-image
teacher, a trained UNet of Stable Diffusion's class: how far its x0 is off for every precision of its weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from torch import Tensor, nn

from fdistill.adapters.checkpoint import load_teacher
from fdistill.adapters.float32_layers import Float32Conv2d
from fdistill.adapters.quantised_layers import KINDS as QUANTISED
from fdistill.adapters.quantised_layers import place
from fdistill.adapters.unet2d import UNet2DDenoiser, wrap
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.files import atomic_file
from fdistill.base.images import to_unit
from fdistill.condition import TextCondition
from fdistill.data.digit_captions import load_captioned_digits
from fdistill.data.digits import load_digits
from fdistill.denoiser import Denoiser
from fdistill.losses import denoising_loss, denoising_weight
from fdistill.noise import add_noise
from fdistill.prediction import Prediction

Network = TypeVar("Network", bound=Denoiser)

LEVELS = (20, 100, 300, 500, 700, 800, 900, 979)
SAMPLES, BATCH, UPDATES_OF_F = 256, 64, 200
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class Case(NamedTuple):
    """A schedule's settings, and what the network predicts."""

    title: str
    scheduler: dict[str, object]


CASES = (
    Case("eps, linear betas (DDPM, DiT, PixArt)", {**LINEAR, "prediction_type": "epsilon"}),
    Case("eps, Stable Diffusion's betas", {**STABLE_DIFFUSION, "prediction_type": "epsilon"}),
    Case("v, Stable Diffusion's betas", {**STABLE_DIFFUSION, "prediction_type": "v_prediction"}),
)


def build(case: Case) -> UNet2DDenoiser:
    """A UNet of the kind of DDPM's on 8 x 8 pixels, with attention."""
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
    )
    return wrap(network, {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, **case.scheduler})


def train(denoiser: UNet2DDenoiser, images: Tensor, *, rate: float, until: Callable[[int, float], float]) -> int:
    """Trains with the family's own weight; the rate falls linearly. Returns the number of updates.

    Args:
        images: uint8 [N, 1, 8, 8].
        until: (updates done, seconds of the processor since the start) -> the share of the training that is done.
    """
    optimizer = torch.optim.AdamW(denoiser.requires_grad_(True).parameters(), lr=rate)
    random, began, done = torch.Generator().manual_seed(0), time.process_time(), 0
    schedule = denoiser.schedule
    while (share := until(done, time.process_time() - began)) < 1:
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (done + 1) / 100) * (1 - share)
        x0 = to_unit(images[torch.randint(len(images), (BATCH,), generator=random)])
        t = 999 * torch.rand(BATCH, generator=random)
        x_t = add_noise(schedule, x0, torch.randn(x0.shape, generator=random), t)
        prediction = denoiser.predict(denoiser.network_input(x_t, t), t, None)[0]
        weight = denoising_weight(denoiser.loss_weighting, schedule.alpha(t), schedule.sigma(t), sigma_data=0.5)
        loss = denoising_loss(prediction, x0, weight, x_t=x_t).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        done += 1
    denoiser.requires_grad_(False)
    return done


class _WideGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)


def _as_on_a_gpu(denoiser: UNet2DDenoiser) -> UNet2DDenoiser:
    for module in denoiser.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = _WideGroupNorm
    return denoiser


@contextmanager
def last_layer(denoisers: tuple[UNet2DDenoiser, ...], kind: type[nn.Conv2d]) -> Iterator[None]:
    """The networks' last layers are of this class inside the block."""
    layers = [denoiser.network.conv_out for denoiser in denoisers]
    before = [layer.__class__ for layer in layers]
    for layer in layers:
        layer.__class__ = kind
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.__class__ = own


@torch.no_grad()
def difference(teacher: UNet2DDenoiser, fake: UNet2DDenoiser, x_t: Tensor, t: Tensor, *, bf16: bool) -> Tensor:
    """T - F in x0 at x_t [B, C, H, W] and levels t [B], in autocast or in float32."""

    def output(denoiser: UNet2DDenoiser) -> Prediction:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return denoiser.predict(denoiser.network_input(x_t, t), t, None)[0]

    # As in the losses: x_t, which both have in common, drops out before anything is rounded.
    (first, _, out, *_), second = output(teacher), output(fake).output
    assert out is not None
    return out.reshape(-1, 1, 1, 1) * (first.float() - second.float())


def exact(x_t: Tensor, images: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The mean of x0 given x_t [B, C, H, W], if all of the images [N, C, H, W] uint8 are equally likely; x0-like."""
    x0 = to_unit(images).double()
    distance = torch.cdist(x_t.double().flatten(1), (alpha * x0).flatten(1)).square()
    return ((-distance / (2 * sigma.double() ** 2)).softmax(1) @ x0.flatten(1)).reshape(x_t.shape)


def shares(teacher: UNet2DDenoiser, fake: UNet2DDenoiser, images: tuple[Tensor, Tensor], level: float) -> list[float]:
    """What a row of the table holds behind its level; `images` are all and those of the student."""
    random = torch.Generator().manual_seed(1)
    every, few = images
    x0 = to_unit(few[torch.randint(len(few), (SAMPLES,), generator=random)])
    t = torch.full((SAMPLES,), float(level))
    x_t = add_noise(teacher.schedule, x0, torch.randn(x0.shape, generator=random), t)
    in_bf16 = copy.deepcopy(teacher).to(torch.bfloat16)
    unrounded = difference(teacher, fake, x_t, t, bf16=False)
    alpha, sigma = teacher.schedule.alpha(t[0]), teacher.schedule.sigma(t[0])
    ideal = exact(x_t, every, alpha, sigma) - exact(x_t, few, alpha, sigma)

    def rms(value: Tensor) -> float:
        return float(value.square().mean().sqrt())

    def share(rounded: Tensor) -> float:
        errors.append(rms(rounded - unrounded))
        return 100 * (errors[-1] / rms(rounded)) ** 2

    errors: list[float] = []
    found = []
    for teacher_of_kind in (teacher, in_bf16):
        for kind in (nn.Conv2d, Float32Conv2d):
            with last_layer((teacher_of_kind, fake), kind):
                found.append(share(difference(teacher_of_kind, fake, x_t, t, bf16=True)))
    return [float(sigma / alpha), rms(ideal), rms(unrounded), *errors[:2], *found]


def noised(denoiser: Denoiser, x0: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """x_t and t at a level, of SAMPLES of the x0; the same draw for every level."""
    random = torch.Generator().manual_seed(1)
    x0 = x0[torch.randint(len(x0), (SAMPLES,), generator=random)] if len(x0) != SAMPLES else x0
    t = torch.full((SAMPLES,), float(level))
    return add_noise(denoiser.schedule, x0, torch.randn(x0.shape, generator=random), t), t


def precisions(teacher: Network) -> dict[str, Network]:
    """The teacher with its weights in every `frozen_precision`, as training has them."""
    found = {"fp32": teacher}
    for name in ("bf16", *QUANTISED):
        found[name] = copy.deepcopy(teacher)
        place(found[name], name, torch.device("cpu"))
    return found


def weights_share(teacher: UNet2DDenoiser, fake: UNet2DDenoiser, few: Tensor) -> str:
    """By level, the share of T - F that is rounding, for each precision of T's weights; those of F are in float32."""
    stored = precisions(teacher)
    lines = [f"| level | {' | '.join(stored)} |", "|" + (1 + len(stored)) * "---|"]
    for level in LEVELS:
        x_t, t = noised(teacher, to_unit(few), level)
        unrounded = difference(teacher, fake, x_t, t, bf16=False)
        cells = []
        for own in stored.values():
            found = difference(own, fake, x_t, t, bf16=True)
            cells.append(f"{float(100 * (found - unrounded).square().sum() / found.square().sum()):.2g} %")
        lines.append(f"| {level} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def weights_error() -> str:
    """By level, how far x0 of the embedded text-to-image teacher is off for each precision of its weights."""
    teacher = load_teacher("digits-t2i").requires_grad_(False)
    pipeline = DiffusionPipeline.from_pretrained(EMBEDDED_TEACHERS["digits-t2i"])
    images, captions = load_captioned_digits()
    text, _ = pipeline.encode_prompt([one.text for one in captions[:SAMPLES]], "cpu", 1, False)
    latents = pipeline.vae.encode(to_unit(images[:SAMPLES])).latent_dist.mean * pipeline.vae.config.scaling_factor
    condition, stored = TextCondition({"prompt_embeds": text}), precisions(teacher)
    sizes = [sum(t.numel() * t.element_size() for t in own.parameters()) for own in stored.values()]
    lines = [
        f"| level | sigma / alpha | x0 | {' | '.join(stored)} |",
        "|" + (3 + len(stored)) * "---|",
    ]
    for level in LEVELS:
        x_t, t = noised(teacher, latents, level)
        exact_x0 = teacher(x_t, t, condition)
        cells = [float(teacher.schedule.sigma(t[0]) / teacher.schedule.alpha(t[0])), float(exact_x0.std())]
        for own in stored.values():
            with torch.autocast("cpu", torch.bfloat16):
                found = own(x_t, t, condition)
            cells.append(float((found - exact_x0).square().mean().sqrt()))
        lines.append(f"| {level} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |")
    shares = ", ".join(f"{name} {size / sizes[0]:.3f}" for name, size in zip(stored, sizes, strict=True))
    return f"Bytes of the weights, as a share of those in fp32: {shares}.\n\n" + "\n".join(lines)


def table(case: Case, seconds: float) -> str:
    """Both tables of a teacher that is trained for some seconds, and its fake score."""
    torch.manual_seed(0)
    images, labels = load_digits()
    few = images[labels < 5]
    teacher = build(case)
    updates = train(teacher, images, rate=1e-3, until=lambda _, spent: spent / seconds)
    fake = copy.deepcopy(teacher)
    train(fake, few, rate=2e-4, until=lambda done, _: done / UPDATES_OF_F)
    teacher, fake = _as_on_a_gpu(teacher.eval()), _as_on_a_gpu(fake.eval())
    size = sum(parameter.numel() for parameter in teacher.parameters()) / 1e6
    lines = [
        f"**{case.title}** ({size:.1f} M parameters, T after {updates} updates, F {UPDATES_OF_F} later)",
        "",
        "| level | sigma / alpha | ideal T - F | T - F | rounding, bf16 | last layer fp32 | share, bf16 | "
        "last layer fp32 | T's weights bf16 | last layer fp32 |",
        "|" + 10 * "---|",
    ]
    for level in LEVELS:
        found = shares(teacher, fake, (images, few), level)
        cells = [f"{value:.3g}" for value in found[:5]] + [f"{value:.2g} %" for value in found[5:]]
        lines.append(f"| {level} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", weights_share(teacher, fake, few)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.5, help="of the processor for each teacher")
    parser.add_argument("--out", type=Path, help="a file for the tables")
    arguments = parser.parse_args()
    text = "\n\n".join(table(case, 60 * arguments.minutes) for case in CASES)
    text += f"\n\n{weights_error()}\n"
    print(text, end="")
    if arguments.out is not None:
        with atomic_file(arguments.out) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
