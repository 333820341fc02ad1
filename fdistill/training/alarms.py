"""Signs in the records that a run is going wrong while all its numbers are finite, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

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


def _least(records: Sequence[Mapping[str, Any]], name: str) -> float:
    """The least value of a quantity, 0 if a record does not have it."""
    return float(min(record.get(name, 0.0) for record in records))
