"""Signs in the records that a run is going wrong while all its numbers are finite, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from fdistill.training.appearance import LOOK

#: What an alarm says about a run, for people who read of it afterwards.
MEANING = {
    "discriminator saturated": "the discriminator told nearly all images right, and so said little about the student",
    "ratio collapse": "nearly all density ratios were at a bound, so that samples were hardly weighted",
    "critic exploding": "the critic's loss grew out of proportion: it could not follow the student",
    "colours burnt": "contrast or saturation rose far above the teacher's",
    "samples alike": "images of one class or prompt became much more alike than before, or than the teacher's",
}
#: How many records `alarms` looks at, and in how many in a row a sign must be: one may be chance.
WINDOW, _LASTING = 10, 3
#: At the highest noise levels nobody can tell data from samples, so that an accuracy over all levels near 1 means that
#: the discriminator sees the difference even there, and that its logits no longer follow how large it is.
_SATURATED = 0.98
#: A ratio outside its bounds is replaced by the bound. With nine in ten replaced the weights of samples hardly differ.
_CLAMPED = 0.9
#: The fake score's loss follows the student's samples, and doubles or halves; ten times is another matter. Logits
#: beyond 10 are cut off before they become ratios, and a mean loss of 10 is a mean logit of 10 on the wrong side.
_GROWN, _WRONG = 10.0, 10.0
#: Of how samples look, divided by the teacher's. Below 0.02 of 1 a quantity is the rounding of greyscale images.
_BURNT, _COLLAPSED, _FALLING, _NOTHING = 1.5, 0.5, 0.9, 0.02


def alarms(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{name: a sentence with what is seen and what to do} for the last of some records, oldest first; those before it,
    up to `WINDOW` in all, decide as well.
    """
    last, found = records[-_LASTING:], {}
    if len(last) < _LASTING:
        return {}
    if (accuracy := _least(last, "discriminator/accuracy")) >= _SATURATED:
        found["discriminator saturated"] = (
            f"its accuracy stays above {accuracy:.3g}, so that it says little about the student; lower "
            "discriminator.lr, or raise discriminator.r1_weight"
        )
    if (clamped := _least(last, "generator/clamped_ratios")) >= _CLAMPED:
        found["ratio collapse"] = (
            f"at least {clamped:.0%} of the density ratios are at ratio.lower or ratio.upper, so that samples are "
            "hardly weighted; move the bounds apart in a new run, or lower discriminator.lr"
        )
    before = [record["fake_score/denoising"] for record in records[:-_LASTING] if "fake_score/denoising" in record]
    grown = _least(last, "fake_score/denoising") / median(before) if len(before) >= _LASTING else 0.0
    wrong = max(_least(last, f"discriminator/gan_{kind}") for kind in ("real", "fake"))
    if grown >= _GROWN or wrong >= _WRONG:
        what = (
            f"the fake score's loss is {grown:.3g} times what it was" if grown >= _GROWN else "its GAN loss is above 10"
        )
        role = "fake_score" if grown >= _GROWN else "discriminator"
        found["critic exploding"] = (
            f"{what}; lower {role}.lr, or lower generator.lr so that the critic can follow the student"
        )
    return found


def drifts(looks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Like `alarms`, of how a run's samples look beside the teacher's: of all records with samples, oldest first.

    A student begins with images that are alike, so that low diversity means something only while it falls.
    """
    found: dict[str, str] = {}
    if len(looks) < 3:
        return found
    for name in ("saturation", "contrast"):
        burnt = min(_beside_teacher(look, name) for look in looks[-2:])
        if burnt >= _BURNT:
            found["colours burnt"] = (
                f"the {name} of samples stays above {burnt:.3g} times the teacher's; lower guidance_scale or "
                "augmentation.weight, or raise critic_steps"
            )
    diversity = [_beside_teacher(look, "diversity") for look in looks]
    highest, now, recent = max(diversity[:-2]), max(diversity[-2:]), diversity[-3:]
    if now < _COLLAPSED * min(highest, 1.0) or (max(recent) < _COLLAPSED and 0 < recent[-1] < _FALLING * recent[0]):
        found["samples alike"] = (
            f"samples of one class or prompt differ {now:.2g} times as much as the teacher's, after {highest:.2g}; "
            "lower generator.lr, raise critic_steps, or take a divergence that covers modes, such as jensen-shannon"
        )
    return found


def _beside_teacher(look: Mapping[str, Any], name: str) -> float:
    """How much a quantity of samples is, divided by the teacher's; 0 where the teacher has next to nothing of it."""
    teacher = float(look.get(f"{LOOK}teacher_{name}", 0.0))
    return float(look.get(f"{LOOK}{name}", 0.0)) / teacher if teacher > _NOTHING else 0.0


def _least(records: Sequence[Mapping[str, Any]], name: str) -> float:
    """The least value of a quantity, 0 if a record does not have it."""
    return float(min(record.get(name, 0.0) for record in records))
