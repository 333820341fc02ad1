"""The options with which images are drawn: their defaults, what is refused, and which were given."""

from __future__ import annotations

from typing import Any

import pytest

from fdistill.base.errors import ArgumentError
from fdistill.generation.sampling import Sampling, check_unread


def test_options_have_their_defaults() -> None:
    plain = Sampling()
    assert (plain.steps, plain.scale, plain.negative_prompt, plain.sampler) == (18, 1.0, "", "heun")
    given = Sampling(num_steps=3, guidance_scale=0.0)
    assert (given.steps, given.scale) == (3, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "hein"}, "sampler: got 'hein'; did you mean 'heun'"),
        ({"num_steps": 0}, "steps: expected at least 1, got 0"),
        ({"sampler": "pipeline", "network": "mine:f"}, "network: got 'mine:f' together with sampler 'pipeline'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Sampling(**options)


def test_options_that_nothing_reads_are_refused_by_the_names_of_the_commands() -> None:
    everything = {
        "num_steps": 18,  # the default, but given
        "guidance_scale": 1.0,
        "guidance_teacher": "weaker",
        "negative_prompt": "x",
        "resolution": 64,
        "network": "mine:f",
    }
    sampling = Sampling(**everything)  # type: ignore[arg-type]
    assert sampling.given() == [
        "steps",
        "guidance_scale",
        "guidance_teacher",
        "negative_prompt",
        "resolution",
        "network",
    ]
    assert sampling.given("resolution", "sampler") == ["resolution"]
    assert Sampling().given() == Sampling(sampler="heun").given() == []
    assert Sampling(sampler="pipeline").given() == ["sampler"]
    check_unread("nobody asks", [])
    with pytest.raises(ArgumentError, match=r"^steps: nobody asks; leave it out$"):
        check_unread("nobody asks", ["steps"])
    with pytest.raises(ArgumentError, match=r"^seeds, steps: nobody asks; leave them out$"):
        check_unread("nobody asks", ["seeds", "steps"])
