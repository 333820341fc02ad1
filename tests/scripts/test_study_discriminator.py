"""The discriminator that is tried on a student's images."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))

import study_discriminator as study

import fdistill
from fdistill.base.images import to_unit
from fdistill.data.digits import load_digits


@pytest.mark.thorough
def test_images_of_an_untrained_student_are_told_from_real_ones_and_real_ones_are_not() -> None:
    torch.manual_seed(0)
    teacher = fdistill.load_teacher("digits").requires_grad_(False)
    images = to_unit(load_digits()[0])
    drawn = iter(images.split(256))
    found = study.accuracies(teacher, study.untrained(teacher), ["down0"], updates=60, images=800)
    assert len(found) == 4
    assert found[0] > 0.9
    assert found[0] > found[-1]
    itself = study.accuracies(teacher, lambda noise, labels: next(drawn)[: len(noise)], ["down0"], 60, 800)
    assert all(0.4 < each < 0.6 for each in itself)
