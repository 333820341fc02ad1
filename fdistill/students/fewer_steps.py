"""How other programs take fewer steps with a student that has learnt to (`student.any_step`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fdistill.rollout import levels_for


def fewer_steps(facts: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What changes in the pipeline's call for each smaller number of steps, largest first.

    Args:
        facts: what the student's file says. Its "call" has a list with one entry for each step, in "sigmas" or
            "timesteps".

    Returns:
        {number of steps: {argument: list}}; empty for a student that has not learnt it, or whose call has no list.
    """
    lists = {key: value for key, value in facts.get("call", {}).items() if isinstance(value, list)}
    if not facts.get("any_step") or not lists:
        return {}
    # The list of a consistency model's pipeline begins with the last step.
    order = -1 if facts.get("pipeline") == "ConsistencyModelPipeline" else 1

    def some_of(entries: list[float], steps: int) -> list[float]:
        return list(levels_for(entries[::order], steps))[::order]

    most = len(facts["levels"]) - 1
    return {steps: {key: some_of(each, steps) for key, each in lists.items()} for steps in range(most, 0, -1)}


def said_in_diffusers(facts: Mapping[str, Any]) -> str:
    """`sigmas=[1.0, 0.75] for 2 steps, sigmas=[1.0] for 1`, and so on; empty where there is nothing to say."""
    return ", ".join(
        f"{', '.join(f'{key}={value}' for key, value in changed.items())} for {_counted(steps)}"
        for steps, changed in fewer_steps(facts).items()
    )


def _counted(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"
