"""How images look, in numbers that are known beforehand."""

from __future__ import annotations

import pytest
import torch

from fdistill.training.appearance import appearance


def flat(*colour: float) -> torch.Tensor:
    """An image [3, 2, 2] of one colour, each channel in [0, 1]."""
    return (255 * torch.tensor(colour).reshape(3, 1, 1).expand(3, 2, 2)).round().to(torch.uint8)


def test_numbers_of_images_that_are_known() -> None:
    halves = torch.tensor([[0, 255], [0, 255]], dtype=torch.uint8).expand(3, 2, 2)
    red, grey = flat(0.6, 0.2, 0.4), flat(0.4, 0.4, 0.4)
    found = appearance(torch.stack([halves, red, grey]), ["a", "b", "b"])
    between = ((0.2**2 + 0.2**2 + 0) / 3) ** 0.5
    wanted = {"brightness": (0.5 + 0.4 + 0.4) / 3, "contrast": 0.5 / 3, "saturation": 0.4 / 3, "diversity": between}
    assert found == pytest.approx(wanted, abs=1e-12)


def test_diversity_is_within_a_group() -> None:
    black, white = flat(0, 0, 0), flat(1, 1, 1)
    images = torch.stack([black, white, black, white])
    assert appearance(images, [0, 1, 0, 1])["diversity"] == 0
    assert appearance(images, [0, 0, 1, 1])["diversity"] == 1
    assert appearance(images, [0, 0, 0, 0])["diversity"] == pytest.approx(4 / 6)
    assert "diversity" not in appearance(images, [0, 1, 2, 3])


def test_greyscale_images_have_no_saturation() -> None:
    assert appearance(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, 0]) == {
        "brightness": 0,
        "contrast": 0,
        "diversity": 0,
    }
