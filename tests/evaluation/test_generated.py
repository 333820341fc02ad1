"""Images that are made when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation.generated import GeneratedImages
from evaluation.protocols import get_protocol
from fdistill.base.errors import DataError
from fdistill.generation.generate import open_maker
from fdistill.generation.sampling import Sampling

CPU = torch.device("cpu")
DIGITS = get_protocol("digits")
RANDOM = replace(DIGITS, random_labels=True)


@pytest.fixture(scope="module")
def maker(tiny_teacher: Path) -> Any:
    return open_maker(tiny_teacher, CPU, Sampling(num_steps=2))


def made(maker: Any, seed: int = 0, count: int = 40, **changes: Any) -> GeneratedImages:
    return GeneratedImages(maker, seed, count, None, CPU, replace(DIGITS, **changes))


def test_an_image_depends_on_seed_and_number_and_not_on_its_batch(maker: Any) -> None:
    whole = made(maker).read(range(40))
    assert whole.shape == (40, 1, 8, 8)
    assert whole.dtype == torch.uint8
    for batch in ([3], [39, 3, 7], range(20, 37)):
        difference = made(maker).read(batch).int() - whole[list(batch)].int()
        assert difference.abs().max() <= 1, "another batch may round a pixel the other way, no more"
        assert (difference != 0).float().mean() < 0.01
    assert not torch.equal(made(maker, seed=1).read(range(40)), whole)
    # As `fdistill generate` makes them.
    assert torch.equal(maker.sample(0, range(40), torch.arange(40) % 10, CPU), whole)


def test_pixels_are_rounded_and_not_truncated(maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = torch.arange(256.0).reshape(1, 1, 16, 16)
    for shift in (0.0, 0.49, -0.49):
        x0 = (levels + shift) / 127.5 - 1
        monkeypatch.setattr(type(maker), "sample", lambda *_, x0=x0: _as_makers_do(x0))
        read = made(maker, count=1, size=16).read([0])
        assert torch.equal(read.flatten(), torch.arange(256, dtype=torch.uint8)), f"pixels moved by {shift} of a level"


def _as_makers_do(x0: Tensor) -> Tensor:
    from fdistill.generation.maker import finite_uint8

    return finite_uint8(x0, [0], "test")


def test_classes_are_in_turn_or_random_by_the_sample(maker: Any) -> None:
    in_turn = made(maker, count=25).labels
    assert in_turn is not None
    assert in_turn.tolist() == [i % 10 for i in range(25)]
    few, many = (made(maker, count=count, random_labels=True).labels for count in (100, 5000))
    assert few is not None
    assert many is not None
    assert torch.equal(few, many[:100])
    other = made(maker, seed=1, count=100, random_labels=True).labels
    assert other is not None
    assert not torch.equal(few, other)
    counts = torch.bincount(many, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 400
    assert counts.max() < 600
    assert len(set(counts.tolist())) > 1


def test_views_are_of_the_same_samples_made_once(maker: Any) -> None:
    calls: list[Sequence[int]] = []

    class Counting:
        def __init__(self) -> None:
            self.__dict__.update({name: getattr(maker, name) for name in ("name", "kind", "sampler", "num_steps")})
            self.weights_sha256, self.guidance_scale = "", None
            self.takes_prompts, self.num_classes, self.text = False, 10, None
            self.model = maker.model

        def sample(self, seed: int, indices: Sequence[int], condition: Any, device: Any) -> Tensor:
            calls.append(indices)
            sampled: Tensor = maker.sample(seed, indices, condition, device)
            return sampled

    protocol = replace(DIGITS, views={"patch": ("center-patch", 4)})
    images = GeneratedImages(Counting(), 0, 8, None, CPU, protocol)  # type: ignore[arg-type]
    views = images.views(protocol)
    whole, patch = views[""].read(range(8)), views["patch"].read(range(8))
    assert torch.equal(patch, whole[:, :, 2:6, 2:6])
    assert len(calls) == 1
    views["patch"].read([0])
    assert len(calls) == 2


def test_what_an_image_costs_is_measured(maker: Any) -> None:
    images = made(maker)
    with images.measured(16):
        images.read(range(4))
    assert images.facts["evaluations_per_image"] == 3
    assert 0 < images.facts["seconds_per_image"] < 1
    assert images.facts["timed_batch_size"] == 16
    assert images.facts["kind"] == "teacher"
    assert images.sha256() is None


def test_samples_of_another_size_are_refused(maker: Any) -> None:
    with pytest.raises(DataError, match="8x8; expected 32x32"):
        made(maker, size=32).read([0])
    enlarged = made(maker, size=16, recipe="center-box").read([0, 1])
    assert torch.equal(enlarged[:, :, ::2, ::2], made(maker).read([0, 1]))
    assert made(maker, channels=3).read([0]).shape == (1, 3, 8, 8)
