"""Fused kernels against plain torch, in Triton's interpreter where there is no GPU; references against closed forms."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fdistill.kernels
from fdistill.base.errors import ArgumentError
from fdistill.divergence import DIVERGENCES, Divergence, get_divergence
from fdistill.ema import EMA
from fdistill.kernels import implementation
from fdistill.kernels.ema import ema
from fdistill.kernels.ratio import ratio, ratio_samples, ratio_weights
from fdistill.kernels.reference import renoise as reference_renoise
from fdistill.kernels.renoise import renoise, renoise_seeded
from fdistill.kernels.scale_rows import scale_rows
from fdistill.kernels.to_x0 import to_x0
from fdistill.losses import denoising_loss, implicit_means, matching_loss, score_difference_loss
from fdistill.prediction import Prediction
from fdistill.ratio import DensityRatio
from support.thorough import at_night

pytest.importorskip("triton")

from triton import jit
from triton import language as tl
from triton.runtime import interpreter

from fdistill.kernels.triton.renoise import _normals
from fdistill.kernels.triton.rows import plan

_convert = interpreter._convert_float


def _rounded_to_nearest(value: Any, source: Any, target: Any, mode: Any) -> Any:
    """Triton's interpreter cuts float32 off where GPUs round it to the nearest bfloat16."""
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(value.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
    return _convert(value, source, target, mode)


interpreter._convert_float = _rounded_to_nearest

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.thorough)]
OPERATIONS = ["denoising", "ema", "implicit", "matching", "ratio", "renoise", "scale_rows", "to_x0"]
#: Odd sizes; a batch of one; one pixel; what one block finishes, one element more; without channels.
SHAPES = [
    *((5, 3, 7, 9), (1, 4, 64, 64), (3, 1, 1, 1), (2, 16385), (7, 13)),
    pytest.param((2, 3, 128, 128), marks=pytest.mark.thorough),
]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def error(value: Tensor, exact: Tensor) -> float:
    """Relative error in the norm; NaN is infinitely wrong."""
    wrong = ((value.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()
    return wrong if math.isfinite(wrong) else math.inf


class Inputs:
    """Random arguments of the losses: networks' outputs in `dtype`, everything else in float32."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        batch = shape[0]
        self.x0, self.x_t = draw(*shape, seed=1), draw(*shape, seed=2)
        self.teacher, self.fake, self.unconditional = (draw(*shape, dtype=dtype, seed=k) for k in (3, 4, 5))
        self.teacher_skip, self.teacher_out, self.fake_skip, self.fake_out, self.weight = (
            draw(batch, seed=k).abs() + 0.2 for k in range(6, 11)
        )

    def wide(self) -> Inputs:
        other = object.__new__(Inputs)
        other.__dict__ = {name: value.double() for name, value in self.__dict__.items()}
        return other

    def predictions(self) -> tuple[Prediction, Prediction]:
        return (
            Prediction(self.teacher, self.teacher_skip, self.teacher_out),
            Prediction(self.fake, self.fake_skip, self.fake_out),
        )


def gradients(loss: Callable[[], Tensor], *leaves: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss [B] or means [k, B], and gradients of it times an upstream gradient that is not 1."""
    for leaf in leaves:
        leaf.requires_grad_(True)
    value = loss()
    upstream = draw(value.shape[-1], seed=99).to(value.dtype) - 0.3
    return value.detach(), list(torch.autograd.grad((value * upstream).sum(), leaves))


def assert_as_exact(fused: list[Tensor], plain: list[Tensor], exact: list[Tensor], floor: float = 5e-7) -> None:
    """Not more than twice as wrong as torch in the same precision, or within four roundings of float32."""
    for got, other, right in zip(fused, plain, exact, strict=True):
        assert got.dtype == other.dtype
        assert got.shape == right.shape
        assert error(got, right) <= max(2 * error(other, right), floor)


def compared(make: Callable[[Inputs, str], tuple[Callable[[], Tensor], list[Tensor]]], inputs: Inputs) -> None:
    """Loss and gradients of the kernel, of the reference, and of the reference in float64."""
    results = []
    for values, backend in ((inputs, "triton"), (inputs, "reference"), (inputs.wide(), "reference")):
        loss, leaves = make(values, backend)
        value, found = gradients(loss, *leaves)
        results.append([value, *found])
    assert_as_exact(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["x0", "raw", "guided", "unnormalised"])
def test_matching(shape: tuple[int, ...], dtype: torch.dtype, form: str) -> None:
    def make(i: Inputs, backend: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
        options: dict[str, Any] = {"weight": i.weight, "backend": backend}
        if form == "x0":
            floor = 1.1  # about what mean |x0 - T| is, so that it is the normaliser of some samples
            return lambda: matching_loss(i.x0, i.teacher, i.fake, floor=floor, **options), [i.x0]
        options["x_t"] = i.x_t
        if form == "unnormalised":
            return lambda: score_difference_loss(i.x0, *i.predictions(), **options), [i.x0]
        teacher, fake = i.predictions()
        if form == "guided":
            teacher = teacher._replace(unconditional=i.unconditional, guidance_scale=4.5)
        return lambda: matching_loss(i.x0, teacher, fake, **options), [i.x0]

    compared(make, Inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("raw", [False, True], ids=["x0", "raw"])
def test_denoising(shape: tuple[int, ...], dtype: torch.dtype, raw: bool) -> None:
    def make(i: Inputs, backend: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
        prediction = i.predictions()[1] if raw else i.fake
        return lambda: denoising_loss(prediction, i.x0, i.weight, x_t=i.x_t, backend=backend), [i.fake]

    compared(make, Inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("raw", [False, True], ids=["x0", "raw"])
def test_implicit(shape: tuple[int, ...], dtype: torch.dtype, raw: bool) -> None:
    def make(i: Inputs, backend: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
        predictions = i.predictions() if raw else (i.teacher, i.fake)
        leaves = [i.x0, i.teacher, i.fake] + ([i.x_t] if raw else [])

        def loss() -> Tensor:
            means = implicit_means(i.x0, *predictions, x_t=i.x_t, backend=backend)
            return torch.stack([means.inner, 0.7 * means.square, means.distance])

        return loss, leaves

    compared(make, Inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_to_x0(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def make(i: Inputs, backend: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
        def loss() -> Tensor:
            x0 = to_x0(i.fake, i.x_t, i.fake_skip, i.fake_out, backend)
            return (x0 * i.x0).flatten(1).mean(1)

        return loss, [i.fake, i.x_t]

    compared(make, Inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("seeded", "scaled"),
    at_night([(True, True), (False, False), (True, False), (False, True)], lambda both: both[0] != both[1]),
    ids=["seeded-scaled", "given-as it is", "seeded-as it is", "given-scaled"],
)
def test_renoise(shape: tuple[int, ...], dtype: torch.dtype, scaled: bool, seeded: bool) -> None:
    x0, noise = draw(*shape, seed=1), draw(*shape, seed=2)
    alpha, sigma, scale = (draw(shape[0], seed=k).abs() + 0.2 for k in (3, 4, 5))
    upstream, through = draw(*shape, seed=6), draw(*shape, dtype=dtype, seed=7)
    seed = torch.tensor(2**62 + 12345, device=DEVICE)
    if seeded:
        noise = reference_renoise.counter_normal(seed, 3, shape[0], x0[0].numel()).reshape(shape)
    results = []
    for backend, kind in (("triton", None), ("reference", None), ("reference", F64)):
        leaf, *rest = (value.to(kind or value.dtype) for value in (x0, alpha, sigma, scale, noise))
        leaf.requires_grad_(True)
        options: dict[str, Any] = {"input_scale": rest[2] if scaled else None, "backend": backend}
        options["input_dtype"] = kind or (dtype if scaled else torch.float32)
        if seeded and kind is None:
            x_t, network_input = renoise_seeded(leaf, seed, 3, *rest[:2], **options)
        else:
            x_t, network_input = renoise(leaf, rest[3], *rest[:2], **options)
        assert (network_input is x_t) == (not scaled)
        total = (x_t * upstream.to(x_t)).sum() + (network_input * through.to(network_input)).sum()
        results.append([x_t.detach(), network_input.detach(), *torch.autograd.grad(total, leaf)])
    assert_as_exact(*results, floor=1e-6)


def test_a_gradient_may_come_through_one_result_alone() -> None:
    x0, noise = draw(3, 2, 5, 5), draw(3, 2, 5, 5, seed=1)
    alpha, sigma, scale = (draw(3, seed=k).abs() for k in (1, 2, 3))
    for index in (0, 1):
        found = []
        for backend in ("triton", "reference"):
            leaf = x0.clone().requires_grad_(True)
            results = renoise(leaf, noise, alpha, sigma, input_scale=scale, backend=backend)
            found.extend(torch.autograd.grad(results[index].square().sum(), leaf))
        torch.testing.assert_close(*found)
        assert found[0].abs().sum() > 0


def test_philox_is_the_published_generator() -> None:
    """The three known answers of Random123's Philox4x32 with ten rounds."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    ones = (0xFFFFFFFF,) * 4
    for counter, key, expected in (
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ones, ones[:2], (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        words = reference_renoise._philox(torch.tensor(key), torch.tensor(counter))
        assert tuple(words.tolist()) == expected


def test_seeded_noise_is_standard_normal_and_independent_between_samples_and_seeds() -> None:
    noise = reference_renoise.counter_normal(torch.tensor(1), 0, 40, 50_000)
    exact = torch.distributions.Normal(0.0, 1.0).cdf(noise.flatten().double().sort().values)
    steps = torch.arange(1, len(exact) + 1, dtype=F64) / len(exact)
    distance = (exact - steps).abs().max().item()  # Kolmogorov-Smirnov; 1.95 / sqrt(n) is exceeded once in a thousand
    assert distance < 1.95 / math.sqrt(len(exact))
    assert 4.5 < noise.abs().max() < 7
    other = reference_renoise.counter_normal(torch.tensor(1 + 2**32), 0, 40, 50_000)
    both = torch.corrcoef(torch.cat([noise, other]).double()).fill_diagonal_(0)
    assert both.abs().max() < 6 / math.sqrt(50_000)
    pairs = noise.reshape(40, 4, -1).transpose(0, 1).flatten(1)  # the four words of a counter
    assert torch.corrcoef(pairs.double()).fill_diagonal_(0).abs().max() < 6 / math.sqrt(500_000)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_seeded_noise_does_not_depend_on_the_batch(backend: str) -> None:
    x0, ones = torch.zeros(6, 3, 5, 7, device=DEVICE), torch.ones(6, device=DEVICE)
    seed = torch.tensor(42, device=DEVICE)
    whole, _ = renoise_seeded(x0, seed, 10, ones, ones, backend=backend)
    for split in ((1, 5), (2, 4), (3, 3)):
        parts, first = [], 10
        for size in split:
            part, _ = renoise_seeded(x0[:size], seed, first, ones[:size], ones[:size], backend=backend)
            parts.append(part)
            first += size
        assert torch.equal(torch.cat(parts), whole)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "expanded": lambda x: x[:1].expand_as(x),
    "batch within": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("others", at_night(["contiguous", "the same"], lambda others: others == "contiguous"))
def test_layouts(first: str, others: str) -> None:
    """Values do not depend on strides, whether tensors share a layout or not."""
    layout = LAYOUTS[first]
    rest = layout if others == "the same" else (lambda x: x)
    plain = Inputs((4, 3, 6, 5), torch.float32)
    if first == "expanded":
        for name in ("x0", "x_t", "teacher", "fake"):
            value = getattr(plain, name)
            setattr(plain, name, value[:1].expand_as(value).contiguous())
    strange = Inputs((4, 3, 6, 5), torch.float32)
    strange.x0 = layout(plain.x0)
    strange.x_t, strange.teacher, strange.fake = (rest(value) for value in (plain.x_t, plain.teacher, plain.fake))
    found = []
    for inputs, backend in ((strange, "triton"), (strange, "reference"), (plain, "reference")):
        leaves = [value.detach().requires_grad_(True) for value in (inputs.x0, inputs.x_t, inputs.teacher, inputs.fake)]
        x0, x_t, teacher, fake = leaves
        target = Prediction(teacher, inputs.teacher_skip, inputs.teacher_out)
        own = Prediction(fake, inputs.fake_skip, inputs.fake_out)
        means = implicit_means(x0, target, own, x_t=x_t, backend=backend)
        noised, fed = renoise(
            x0,
            inputs.x_t.detach(),
            inputs.weight,
            inputs.fake_out,
            input_scale=inputs.fake_skip,
            input_dtype=torch.bfloat16,
            backend=backend,
        )
        last = renoise_seeded(
            x0.detach(),
            torch.tensor(3, device=DEVICE),
            0,
            inputs.weight,
            inputs.fake_out,
            input_dtype=torch.float16,
            channels_last=True,
            backend=backend,
        )
        assert last[1].is_contiguous(memory_format=torch.channels_last)
        losses = [
            matching_loss(x0, target, own, weight=inputs.weight, x_t=x_t, backend=backend),
            denoising_loss(own, x0.detach(), inputs.weight, x_t=x_t.detach(), backend=backend),
            means.inner + means.square,
            means.distance,
        ]
        total = torch.stack(losses[:3]).sum() + noised.square().sum() + fed.float().sum()
        results = [*losses, noised, fed, *last, *torch.autograd.grad(total, leaves)]
        found.append([value.detach() for value in results])
    for fused, reference, contiguous in zip(*found, strict=True):
        # In half precision a value between two neighbours may be rounded to either.
        share = 2e-5 if contiguous.dtype == torch.float32 else torch.finfo(contiguous.dtype).eps
        torch.testing.assert_close(fused, contiguous, rtol=share, atol=2e-5)
        torch.testing.assert_close(reference, contiguous, rtol=share, atol=2e-5)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gradients_may_arrive_in_any_layout(backend: str) -> None:
    """What autograd brings is laid out as whatever came after, which may put the batch anywhere."""
    for after in (lambda y: y.flatten(1).T.contiguous(), lambda y: y.transpose(0, 1).reshape(3, -1)):
        found = []
        for dtype in (torch.float32, F64):
            i = Inputs((4, 3, 5, 6), torch.float32)
            fake, x_t, x0 = (value.to(dtype).requires_grad_(True) for value in (i.fake, i.x_t, i.x0))
            ones = i.weight.to(dtype)
            chosen = backend if dtype == torch.float32 else "reference"
            noised, fed = renoise(x0, i.teacher.to(dtype), ones, ones, input_scale=ones, backend=chosen)
            total = sum((after(y) ** 4).sum() for y in (to_x0(fake, x_t, ones, ones, chosen), noised, fed))
            found.append(torch.autograd.grad(total, (fake, x_t, x0)))
        for got, right in zip(*found, strict=True):
            assert error(got, right) < 1e-5


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_an_empty_batch_gives_empty_results(backend: str) -> None:
    x0 = torch.zeros(0, 3, 4, 4, device=DEVICE, requires_grad=True)
    none = torch.zeros(0, device=DEVICE)
    prediction = Prediction(x0, none, none)
    detached = x0.detach()
    assert matching_loss(x0, prediction, prediction, x_t=detached, backend=backend).shape == (0,)
    assert denoising_loss(prediction, detached, none, x_t=detached, backend=backend).shape == (0,)
    assert implicit_means(x0, prediction, prediction, x_t=detached, backend=backend).inner.shape == (0,)
    x_t, fed = renoise(x0, detached, none, none, input_scale=none, input_dtype=torch.bfloat16, backend=backend)
    assert x_t.shape == fed.shape == x0.shape
    total = matching_loss(x0, detached, detached, backend=backend).sum() + fed.float().sum()
    (gradient,) = torch.autograd.grad(total, x0)
    assert gradient.shape == x0.shape


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_difference_is_no_loss(backend: str) -> None:
    x0 = draw(3, 2, 5, 5).requires_grad_(True)
    same = x0.detach().clone()
    means = implicit_means(x0, same, same, backend=backend)
    losses = [
        matching_loss(x0, same, same, backend=backend),
        denoising_loss(x0, same, torch.ones(3, device=DEVICE), backend=backend),
        means.inner,
        means.square,
    ]
    assert all((loss == 0).all() for loss in losses)
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), x0)
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", [*DIVERGENCES, "alpha(0.3)", "alpha(-2.5)"])
def test_powers_are_the_weight(name: str) -> None:
    divergence = get_divergence(name)
    assert divergence.powers is not None
    r = torch.logspace(-6, 6, 97, dtype=F64)
    factor, power, power1p = divergence.powers
    torch.testing.assert_close(factor * r**power * (1 + r) ** power1p, divergence.weight(r), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", [*DIVERGENCES, "alpha(0.3)", "alpha(-30)", "alpha(60)"])
@pytest.mark.parametrize(
    ("batch", "heads", "edges", "momentum"),
    [(64, 1, "log-sigma", 0.0), (700, 3, "linear", 0.5), (5, 70, "log-sigma", 0.9), (1, 2, "linear", 0.0)],
)
def test_ratio(name: str, batch: int, heads: int, edges: Any, momentum: float) -> None:
    logits, level = draw(batch, heads) * 4, (draw(batch, seed=1) * 3).exp()
    found = []
    for backend in ("triton", "reference"):
        state = DensityRatio(bin_edges=edges, momentum=momentum)
        for k in range(2):
            result = state.evaluate(logits + k, level, name, ramp=0.75, backend=backend)
        found.append([result.weight, result.h, result.clamped, state.bins])
    # r^a takes the rounding of a head mean, which is float32, a times.
    rtol = {"alpha(-30)": 3e-5, "alpha(60)": 6e-5}.get(name, 2e-6)
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ratio_in_two_halves_is_ratio_in_one(dtype: torch.dtype) -> None:
    """What several processes do around their exchange, and one process in one launch."""
    logits, level, bins = draw(40, 5, dtype=dtype) * 4, (draw(40, seed=1) * 3).exp(), torch.ones(7, device=DEVICE)
    bounds, rest = (0.1, 20.0), (0.2, 1.0, 1.0, -1.0)
    edges = (0.01, 60.0, True)
    for backend in ("triton", "reference"):
        new, other = bins.clone(), bins.clone()
        weight, h, clamped = ratio(logits, level, new, *bounds, *edges, *rest, backend)
        samples = ratio_samples(logits, level, *bounds, 7, *edges, backend)
        parts = ratio_weights(samples, other, *rest, backend)
        assert not torch.equal(new, bins)
        for one, two in zip((weight, h, clamped, new), (*parts, samples[:, 2], other), strict=True):
            assert torch.equal(one, two)


def test_many_logits_take_a_launch_of_their_own() -> None:
    """More than one block should add up."""
    logits, level = draw(600, 64) * 4, (draw(600, seed=1) * 3).exp()
    weights = [
        DensityRatio().evaluate(logits, level, "js", backend=backend).weight for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*weights, rtol=1e-6, atol=0)


def test_many_bins_and_no_samples() -> None:
    logits, level = draw(50, 2) * 4, (draw(50, seed=1) * 3).exp()
    found = []
    for backend in ("triton", "reference"):
        state = DensityRatio(num_bins=300)
        found.append([state.evaluate(logits, level, "js", backend=backend).weight, state.bins])
        empty = state.evaluate(logits[:0], level[:0], "js", backend=backend)
        assert empty.weight.shape == empty.h.shape == empty.clamped.shape == (0,)
        assert torch.equal(state.bins, found[-1][1])
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_ratio_extremes(backend: str) -> None:
    logits = torch.tensor([1e30, -1e30, math.inf, -math.inf, 0.0], device=DEVICE)
    level = torch.tensor([0.0, math.inf, 1e-30, 1e30, 1.0], device=DEVICE)
    result = DensityRatio().evaluate(logits, level, "kl", backend=backend)
    assert torch.isfinite(result.weight).all()
    assert result.clamped.tolist() == [1, 1, 1, 1, 0]
    broken = DensityRatio().evaluate(torch.tensor([0.0, math.nan], device=DEVICE), level[:2], "kl", backend=backend)
    assert torch.isnan(broken.weight).any(), "a NaN must be seen, not turned into a bound"


def test_a_divergence_of_ones_own_is_computed_by_torch() -> None:
    own = Divergence("mine", lambda r: (r - 1) ** 2, lambda r: 2 * r**2)
    logits, level = draw(30), draw(30, seed=1).abs()
    weight = DensityRatio().evaluate(logits, level, own).weight
    torch.testing.assert_close(weight, DensityRatio().evaluate(logits, level, "pearson").weight)
    with pytest.raises(ArgumentError, match="mine"):
        DensityRatio().evaluate(logits, level, own, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decays", [(0.9,), (0.5, 0.999, 0.0)], ids=str)
def test_ema(dtype: torch.dtype, decays: tuple[float, ...]) -> None:
    """Tensors of many sizes and layouts, one of which no 16-byte load may touch, against float64."""
    flat = draw(4097, dtype=dtype)
    values = [draw(5000, dtype=dtype), flat[1:], draw(3, 2, 3, 3, dtype=dtype), draw(7, 5, dtype=dtype).T]
    values += [
        draw(dtype=dtype),
        draw(0, dtype=dtype),
        draw(4, 3, 3, 3, dtype=dtype).to(memory_format=torch.channels_last),
    ]
    starts = [draw(*value.shape, seed=8) for value in values]
    found = {}
    for backend in ("triton", "reference"):
        shadows = [
            torch.empty_like(v, dtype=torch.float32).copy_(s)
            for _ in decays
            for v, s in zip(values, starts, strict=True)
        ]
        ema(shadows, values, decays, backend)
        found[backend] = shadows
    exact = [d * s.double() + (1 - d) * v.double() for d in decays for v, s in zip(values, starts, strict=True)]
    for fused, plain, right in zip(found["triton"], found["reference"], exact, strict=True):
        torch.testing.assert_close(fused.double(), right, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(plain.double(), right, rtol=1e-6, atol=1e-6)


def test_ema_of_one_decay_twice_is_that_decay() -> None:
    module = torch.nn.Linear(2, 2)
    average = EMA(module, [0.5, 0.5])
    module.weight.data += 1
    average.update()
    torch.testing.assert_close(average.shadows[0.5]["weight"], module.weight.detach() - 0.5)


def test_a_sample_of_many_chunks() -> None:
    """Of 49, whose sums one block adds up."""
    size = 3 * 512**2 + 3
    x0, teacher, fake = (draw(1, size, seed=k) for k in range(3))
    weight = torch.full((1,), 1.3, device=DEVICE)
    results = []
    for values, backend in (
        ((x0, teacher, fake), "triton"),
        ((x0.double(), teacher.double(), fake.double()), "reference"),
    ):
        leaf = values[0].requires_grad_(True)
        loss = matching_loss(leaf, values[1], values[2], weight=weight, backend=backend)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    for fused, exact in zip(*results, strict=True):
        assert error(fused, exact) < 1e-6


# ---- references: derivatives in float64


def rows64(*shape: int, seed: int) -> Tensor:
    return draw(*shape, seed=seed).double().requires_grad_(True)


@pytest.mark.parametrize("raw", [False, True], ids=["x0", "raw"])
def test_reference_derivatives(raw: bool) -> None:
    x0, x_t, teacher, fake = (rows64(3, 2, 4, seed=k) for k in range(4))
    coefficients = [draw(3, seed=k).double() for k in range(4, 8)] if raw else [None] * 4
    weight = draw(3, seed=9).double()
    noised = x_t if raw else None

    def means(*tensors: Tensor) -> Tensor:
        a, b, t, f = tensors
        return torch.ops.fdistill.implicit(a, b if raw else None, t, f, *coefficients, "reference")[:2]

    assert torch.autograd.gradcheck(means, (x0, x_t, teacher, fake))
    detached = None if noised is None else noised.detach()
    assert torch.autograd.gradcheck(
        lambda p: torch.ops.fdistill.denoising(p, detached, x0.detach(), *coefficients[:2], weight, "reference")[0],
        (fake,),
    )
    scale = draw(3, seed=10).double()
    linear = lambda p, x: to_x0(p, x, weight, scale, "reference")  # noqa: E731
    assert torch.autograd.gradcheck(linear, (fake, x_t))
    assert torch.autograd.gradgradcheck(linear, (fake, x_t))
    assert torch.autograd.gradcheck(
        lambda x: renoise(x, x_t.detach(), weight, scale, input_scale=scale if raw else None, backend="reference"),
        (x0,),
    )


def test_matching_is_the_pseudo_target_regression() -> None:
    """Value and gradient of mean((x0 - sg(x0 - g))^2) / 2, with g written out from the raw outputs in float64."""
    i = Inputs((4, 3, 5, 2), torch.float32).wide()

    def column(value: Tensor) -> Tensor:
        return value[:, None, None, None]

    guided = i.unconditional + 3.0 * (i.teacher - i.unconditional)
    teacher_x0 = column(i.teacher_skip) * i.x_t + column(i.teacher_out) * guided
    fake_x0 = column(i.fake_skip) * i.x_t + column(i.fake_out) * i.fake
    x0 = i.x0.clone().requires_grad_(True)
    g = column(i.weight / (x0 - teacher_x0).abs().mean((1, 2, 3))) * (fake_x0 - teacher_x0)
    pseudo = ((x0 - (x0 - g).detach()).square() / 2).mean((1, 2, 3))
    upstream = draw(4, seed=77).double()
    (expected,) = torch.autograd.grad((pseudo * upstream).sum(), x0)
    for backend, rtol in (("reference", 1e-12), ("triton", 1e-5)):
        narrow = Inputs((4, 3, 5, 2), torch.float32)
        values = i if backend == "reference" else narrow
        leaf = values.x0.clone().requires_grad_(True)
        teacher, fake = values.predictions()
        teacher = teacher._replace(unconditional=values.unconditional, guidance_scale=3.0)
        loss = matching_loss(leaf, teacher, fake, weight=values.weight, x_t=values.x_t, backend=backend)
        (gradient,) = torch.autograd.grad((loss * upstream).sum(), leaf)
        torch.testing.assert_close(loss.double().detach(), pseudo.detach(), rtol=rtol, atol=0)
        torch.testing.assert_close(
            gradient.double(), expected, rtol=rtol, atol=1e-12 if backend == "reference" else 1e-7
        )


# ---- operators


def arguments() -> dict[str, list[tuple[Any, ...]]]:
    """Calls of every operator, some with narrow leaves, whose fake results must be as wide as the real ones."""
    x0, x_t, raw = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1), draw(3, 2, 4, 4, seed=2)
    last = x0.to(memory_format=torch.channels_last).requires_grad_(True)
    ones = torch.ones(3, device=DEVICE)
    four, none = (ones, ones, ones, ones), (None, None, None, None)
    level, bins = ones.clone(), torch.ones(5, device=DEVICE)
    seed = torch.tensor(4, device=DEVICE)
    edges, rest = (0.1, 20.0, 0.01, 80.0, True), (0.5, 1.0, 1.0, 0.0)
    leaf, narrow = x0.clone().requires_grad_(True), raw.bfloat16().requires_grad_(True)
    upstream, half, bf16 = torch.ones(3, 3, device=DEVICE), raw.half(), raw.bfloat16()
    return {
        "matching": [
            (leaf, x_t, raw, raw, raw, *four, ones, 1e-6, 2.0),
            (last, None, raw, None, raw, *none, ones, None, 1.0),
            (narrow, None, bf16, None, bf16, *none, ones, 1e-6, 1.0),
        ],
        "denoising": [
            (raw.clone().requires_grad_(True), x_t, x0, ones, ones, ones),
            (narrow, None, bf16, None, None, ones),
        ],
        "implicit": [(leaf, x_t, raw, raw, *four), (last, None, raw, raw, *none)],
        "implicit_backward": [
            (upstream, x0, x_t, raw, raw, *four),
            (upstream, x0, x_t.half(), bf16, half, *four),
        ],
        "scale_rows": [(leaf, ones, ones, torch.bfloat16), (last, ones, None, torch.float32)],
        "to_x0": [(narrow, leaf, ones, ones)],
        "renoise": [
            (leaf, x_t, ones, ones, ones, torch.bfloat16, True),
            (last, x_t, ones, ones, None, torch.float32, False),
            (narrow, bf16, ones, ones, ones, torch.float16, False),
        ],
        "renoise_seeded": [(leaf, seed, 5, ones, ones, ones, torch.float16, False)],
        "renoise_backward": [
            (x0, bf16, ones, ones, torch.float32),
            (None, raw, ones, ones, torch.float32),
            (x0, bf16, ones, ones, torch.bfloat16),
        ],
        "ratio": [
            (draw(3, 2), level, bins, *edges, *rest),
            (draw(3, 2).bfloat16(), level, bins.clone(), *edges, *rest),
        ],
        "ratio_samples": [
            (logits, level, 0.1, 20.0, 5, 0.01, 80.0, True) for logits in (draw(3, 2), draw(3, 2).half())
        ],
        "ratio_weights": [(torch.ones(3, 3, device=DEVICE), bins, *rest)],
        "ema": [([x0.clone(), x_t.clone()], [x0, x_t], [0.9])],
    }


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gradients_of_implicit_have_the_dtypes_of_their_arguments(backend: str) -> None:
    """Autograd would cast them, and hide that they were written wider."""
    call = arguments()["implicit_backward"][1]
    found = torch.ops.fdistill.implicit_backward(*call, backend)
    assert [value.dtype for value in found] == [torch.float32, torch.float16, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_derivative_of_scale_rows_has_both_factors(backend: str) -> None:
    rows, scale, upstream = draw(3, 4).requires_grad_(True), draw(3, seed=1), draw(3, seed=2)
    scaled = scale_rows(rows, scale, upstream, torch.float32, backend)
    (gradient,) = torch.autograd.grad(scaled.sum(), rows)
    torch.testing.assert_close(gradient, (scale * upstream)[:, None].expand(3, 4))


def test_numbers_a_sample_may_have_any_strides() -> None:
    def strided(value: Tensor) -> Tensor:
        return value.repeat_interleave(2, -1)[..., ::2]

    i = Inputs((8, 2, 4, 4), torch.float32)
    four = (i.teacher_skip, i.teacher_out, i.fake_skip, i.fake_out)
    samples = (i.x0, i.x_t, i.teacher, i.fake)
    upstream = draw(3, 8)
    logits, level, bins = draw(8, 5) * 2, (draw(8, seed=1) * 3).exp(), torch.ones(7, device=DEVICE)
    bounds, rest = (0.1, 20.0, 0.01, 60.0), (0.2, 1.0, 1.0, -1.0)
    ready = ratio_samples(logits, level, *bounds[:2], 7, *bounds[2:], True, "reference")
    found = []
    for backend, form in (("triton", strided), ("reference", Tensor.contiguous)):
        c = [form(value) for value in four]
        arrived = upstream.t().contiguous().t() if backend == "triton" else upstream
        sideways = logits.t().contiguous().t() if backend == "triton" else logits
        turned = ready.t().contiguous().t() if backend == "triton" else ready
        found.append(
            [
                torch.ops.fdistill.matching(
                    i.x0, i.x_t, i.teacher, None, i.fake, *c, form(i.weight), 1e-6, 1.0, backend
                )[0],
                *torch.ops.fdistill.implicit_backward(arrived, *samples, *c, backend),
                *ratio(sideways, form(level), bins.clone(), *bounds, True, *rest, backend),
                *ratio_weights(turned, form(bins).contiguous(), *rest, backend),
            ]
        )
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_widest_bounds_are_reached(backend: str) -> None:
    """Logits are clamped to +-10 before they become ratios, beyond every bound that is accepted."""
    lower, upper = 4.6e-5, 22026.0
    logits, level = torch.tensor([12.0, -12.0, 0.5], device=DEVICE), torch.ones(3, device=DEVICE)
    result = DensityRatio(lower=lower, upper=upper, num_bins=1).evaluate(logits, level, "kl", backend=backend)
    expected = torch.tensor([upper, lower, math.exp(0.5)], device=DEVICE)
    torch.testing.assert_close(result.weight, expected / expected.mean())
    assert result.clamped.tolist() == [1.0, 1.0, 0.0]


def test_ema_of_tensors_that_cannot_be_walked_together() -> None:
    values = [draw(4, 3, 3, 3, dtype=torch.bfloat16), draw(4, 6, dtype=torch.bfloat16)[:, ::2]]

    def shadows() -> list[Tensor]:
        last = draw(4, 3, 3, 3, seed=2).to(memory_format=torch.channels_last)
        return [last, torch.zeros(4, 6, device=DEVICE)[:, ::2]]

    fused, plain = shadows(), shadows()
    ema(fused, values, [0.3], "triton")
    ema(plain, values, [0.3], "reference")
    for got, right in zip(fused, plain, strict=True):
        torch.testing.assert_close(got, right)


def test_a_word_of_zero_is_no_infinite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes once in four billion draws."""
    words = torch.zeros(4, 1, 4, dtype=torch.int64)
    monkeypatch.setattr(reference_renoise, "_philox", lambda key, counter: words)
    assert torch.isfinite(reference_renoise.counter_normal(torch.tensor(0), 0, 1, 16)).all()

    @jit
    def normals_of_zero(to: Any) -> None:
        zero = tl.zeros((16,), tl.uint32)
        first, _ = _normals(zero, zero)
        tl.store(to + tl.arange(0, 16), first)

    made = torch.zeros(16, device=DEVICE)
    normals_of_zero[(1,)](made)
    assert torch.isfinite(made).all()
    assert (made != 0).all()


def test_a_sample_is_split_at_most_as_often_as_one_block_can_add_up() -> None:
    for size in (1, 3072, 16384, 16385, 10**7, 2**24 + 1, 2**30):
        made = plan(torch.empty(2, size, device="meta"))
        assert made.splits <= 1024
        assert (made.splits - 1) * made.chunk < size <= made.splits * made.chunk
        assert made.chunk % 2048 == 0


CALLS = [
    (name, k, backend)
    for name, calls in arguments().items()
    for k in range(len(calls))
    for backend in ("triton", "reference")
]


# By day, each call with one of the backends, in turns.
@pytest.mark.parametrize(
    ("name", "index", "backend"), at_night(CALLS, lambda call: (call[1] % 2 == 0) != (call[2] == "triton"))
)
def test_operators_keep_torchs_rules(name: str, index: int, backend: str) -> None:
    """Schema, fake implementation and derivative, as torch examines them for torch.compile."""
    operator = getattr(torch.ops.fdistill, name).default
    torch.library.opcheck(operator, (*arguments()[name][index], backend))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_tail_compiles_into_one_graph(backend: str) -> None:
    i = Inputs((4, 3, 8, 8), torch.bfloat16)
    level = i.weight.clone()
    state = torch.ones(10, device=DEVICE)

    def tail(x0: Tensor, teacher: Tensor, fake: Tensor, seed: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        x_t, fed = renoise_seeded(
            x0, seed, 0, i.weight, i.fake_out, input_scale=i.fake_skip, input_dtype=torch.bfloat16, backend=backend
        )
        weight, *_ = ratio(logits, level, state, 0.1, 20.0, 0.002, 80.0, True, 0.0, 1.0, 1.0, -1.0, backend)
        target = Prediction(teacher, i.teacher_skip, i.teacher_out)
        own = Prediction(fake, i.fake_skip, i.fake_out)
        loss = matching_loss(x0, target, own, weight=weight.float(), x_t=x_t, backend=backend).mean()
        return loss + fed.float().square().mean(), x_t

    seed, logits = torch.tensor(9, device=DEVICE), draw(4, 2, seed=20)
    found = []
    for function in (tail, torch.compile(tail, backend="aot_eager", fullgraph=True)):
        leaf = i.x0.clone().requires_grad_(True)
        loss, x_t = function(leaf, i.teacher, i.fake, seed, logits)
        found.append([loss.detach(), x_t.detach(), *torch.autograd.grad(loss, leaf)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


def test_both_backends_have_the_same_functions() -> None:
    folder = Path(fdistill.kernels.__file__).parent
    files = {path.stem for path in (folder / "reference").glob("*.py")} - {"__init__"}
    assert files == set(OPERATIONS)
    assert files == {path.stem for path in (folder / "triton").glob("*.py")} - {"__init__", "rows"}
    assert files <= {path.stem for path in folder.glob("*.py")}
    for name in files:
        fused, plain = (importlib.import_module(f"fdistill.kernels.{kind}.{name}") for kind in ("triton", "reference"))
        public = {
            key
            for key, value in vars(fused).items()
            if inspect.isfunction(value) and value.__module__ == fused.__name__ and not key.startswith("_")
        }
        assert name in public
        for key in public:
            assert inspect.signature(getattr(fused, key)) == inspect.signature(getattr(plain, key)), (name, key)


def test_backends_are_chosen_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, wide = torch.zeros(2, 3), torch.zeros(2, 3, dtype=F64)
    assert ".reference." in implementation("matching", "auto", plain).__name__  # the interpreter is no GPU
    with pytest.raises(ArgumentError, match="float64"):
        implementation("matching", "triton", wide)
    with pytest.raises(ArgumentError, match="did you mean 'triton'"):
        implementation("matching", "tritn", plain)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ArgumentError, match="needs CUDA tensors, got cpu"):
        implementation("matching", "triton", plain)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": torch.ones(3, device=DEVICE)}, r"alpha: expected a float tensor \(2,\)"),
        ({"sigma": torch.ones(2, 1, device=DEVICE)}, "sigma"),
        ({"input_scale": torch.ones(2, dtype=torch.int64, device=DEVICE)}, "input_scale"),
        ({"seed": torch.ones(2, dtype=torch.int64, device=DEVICE)}, "seed: expected a 0-d int64"),
        ({"seed": torch.tensor(1.0, device=DEVICE)}, "seed"),
        ({"first": -1}, "first"),
        ({"x0": torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)}, "x0: expected a float tensor"),
        ({"x0": torch.zeros(2, 3, device="meta")}, "alpha: expected a float tensor"),
        ({"channels_last": True}, "channels_last"),
    ],
)
def test_renoise_refuses_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    ones = torch.ones(2, device=DEVICE)
    call: dict[str, Any] = {"x0": torch.zeros(2, 3, device=DEVICE), "seed": torch.tensor(1, device=DEVICE), "first": 0}
    with pytest.raises(ArgumentError, match=message):
        renoise_seeded(**(call | {"alpha": ones, "sigma": ones} | changed))


def test_losses_of_raw_outputs_refuse_what_does_not_fit() -> None:
    x0, ones = torch.zeros(2, 3, device=DEVICE), torch.ones(2, device=DEVICE)
    raw = Prediction(x0, ones, ones)
    for call, message in (
        (lambda: matching_loss(x0, raw, raw), "x_t: expected the noised samples"),
        (lambda: matching_loss(x0, raw, raw, x_t=x0[:1]), "x_t: expected a float tensor"),
        (lambda: matching_loss(x0, Prediction(x0, ones, ones[:1]), raw, x_t=x0), r"teacher_x0\.out"),
        (lambda: matching_loss(x0, Prediction(x0, unconditional=x0.int()), x0), "unconditional"),
        (lambda: matching_loss(x0, Prediction(x0, guidance_scale=2.0), x0), "unconditional: guidance_scale 2 needs"),
        (lambda: matching_loss(x0, Prediction(x0, ones), raw, x_t=x0), "teacher_x0: expected a Prediction with both"),
        (lambda: matching_loss(x0, Prediction(x0, None, ones), x0), "teacher_x0: expected a Prediction with both"),
        (lambda: matching_loss(x0, x0.double(), x0), "teacher_x0: float64 cannot be mixed with other dtypes"),
        (lambda: denoising_loss(x0, x0.int(), ones), "x0: expected a float tensor"),
        (lambda: denoising_loss(x0, x0, torch.ones(3, device=DEVICE)), "weight"),
        (lambda: implicit_means(x0, x0, x0[:, :2]), "fake_x0"),
        (lambda: score_difference_loss(x0, x0, x0, torch.ones(2, 1, device=DEVICE)), "weight"),
        (lambda: matching_loss(torch.zeros(2, 0, device=DEVICE), x0, x0), "x0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()


def test_scale_rows_reads_a_mean_s_gradient_as_one_number() -> None:
    direction, scale = draw(5, 3, 3), draw(5, seed=1)
    upstream = torch.tensor(0.2, device=DEVICE).expand(5)
    torch.testing.assert_close(
        scale_rows(direction, scale, upstream, torch.float32, "triton"), direction * (0.2 * scale)[:, None, None]
    )


def test_every_operator_is_examined() -> None:
    assert {name for name, _, _ in CALLS} >= set(OPERATIONS)
