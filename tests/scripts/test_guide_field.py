"""Fields seen under random views as generators: the render, the gradient of SDS, and a short run of the study."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fdistill.base import rng
from fdistill.kernels.layout import expand
from fdistill.losses import score_difference_loss, score_difference_weight
from fdistill.noise import VPSchedule
from support.predictions import to_x0

sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))

import guide_field

pytestmark = pytest.mark.thorough  # what is tried here takes a minute

# Through the normal distribution function these values of the noise are a shift or angle at its bound.
LEAST, MOST = -10.0, 10.0


def fields(count: int) -> guide_field.Fields:
    return guide_field.Fields(count, torch.Generator().manual_seed(0))


def view(shift_x: float = 0.0, shift_y: float = 0.0, angle: float = 0.0) -> torch.Tensor:
    noise = torch.zeros(1, 1, 8, 8)
    noise[0, 0, 0, :3] = torch.tensor([shift_x, shift_y, angle])
    return noise


def test_the_gradient_of_a_view_reaches_every_parameter() -> None:
    module = fields(2)
    x0 = module(torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert x0.shape == (6, 1, 8, 8)
    x0[::2].square().sum().backward()  # views of the first field alone
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad[0].abs().sum() > 0
        assert parameter.grad[1].abs().sum() == 0


def test_a_view_shifted_by_a_pixel_is_the_upright_one_a_pixel_on() -> None:
    module = fields(1)
    upright = module.upright()
    assert upright.std() > 0.1
    torch.testing.assert_close(module(view(shift_x=MOST))[..., :-1], upright[..., 1:])
    torch.testing.assert_close(module(view(shift_x=LEAST))[..., 1:], upright[..., :-1])
    torch.testing.assert_close(module(view(shift_y=MOST))[..., :-1, :], upright[..., 1:, :])


def test_rotation_keeps_distances_and_turns_by_ten_degrees_at_most() -> None:
    upright, turned = guide_field.view_coordinates(torch.cat([view(), view(angle=MOST)]))
    torch.testing.assert_close(turned.norm(dim=1), upright.norm(dim=1))
    cosine = (turned * upright).sum(1) / upright.norm(dim=1).square()
    torch.testing.assert_close(cosine, torch.full((64,), guide_field.ANGLE).cos())


def test_moved_images_look_like_views_of_the_same_content() -> None:
    generator = torch.Generator().manual_seed(2)
    image = torch.full((1, 1, 8, 8), -1.0)
    image[..., 3:5, 3:5] = 1.0
    moved = guide_field.moved(image.expand(500, -1, -1, -1), generator)
    assert moved.min() >= -1
    assert moved.max() <= 1
    torch.testing.assert_close(moved.mean((1, 2, 3)), image.mean().expand(500), atol=0.03, rtol=0)
    torch.testing.assert_close(moved.mean(0), moved.mean(0).flip(2), atol=0.1, rtol=0)


@pytest.mark.parametrize("weighting", ["kl", "vsd"])
def test_a_point_as_fake_score_gives_the_gradient_of_sds(weighting: str) -> None:
    """x0 = W z and eps_pred(x_t) = A x_t, in float64: d/dW is sum_b (weight alpha (eps_pred - eps)) z^T, by hand."""
    generator = torch.Generator().manual_seed(3)
    w, a, z, eps = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (6, 6), (5, 4), (5, 6))
    )
    schedule = VPSchedule(torch.linspace(0.999, 0.01, 100, dtype=torch.float64))
    t = 99 * rng.uniform(generator, 5).double()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    w.requires_grad_(True)
    x0 = z @ w.T
    x_t = expand(alpha, eps) * x0.detach() + expand(sigma, eps) * eps
    eps_pred = x_t @ a.T
    teacher_x0 = to_x0(eps_pred, x_t, alpha, sigma, "eps")
    if weighting == "kl":  # w (alpha / sigma)^2 weighs the KL divergence by w, here 1
        weight, sds = (alpha / sigma).square(), alpha / sigma
    else:  # DreamFusion's sigma^2
        weight, sds = score_difference_weight("vsd", alpha, sigma), sigma.square()
    score_difference_loss(x0, teacher_x0, x0, weight).sum().backward()
    expected = (expand(sds, eps) * (eps_pred - eps)).T @ z / 6  # the loss is a mean over the 6 values of a sample
    torch.testing.assert_close(w.grad, expected, rtol=1e-10, atol=1e-12)


def test_a_short_study_writes_scores_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        guide_field.main([str(tmp_path / "out"), "--seeds", "2", "--iterations", "2", "--classes", "4"])
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "out" / "fields.json").read_text())
    rows = [guide_field.REAL, guide_field.TEACHER, *guide_field.METHODS]
    assert list(result["scores"]) == rows
    assert result["scores"][guide_field.REAL][0]["recognised"] == 1
    assert (tmp_path / "out" / "fields.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"| {row} |" in printed for row in rows)
