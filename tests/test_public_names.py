"""What `fdistill` offers: names that are imported on first use, which nothing else would look up."""

from __future__ import annotations

import pytest

import fdistill


@pytest.mark.parametrize("name", fdistill.__all__)
def test_every_public_name_is_where_it_is_looked_for(name: str) -> None:
    assert getattr(fdistill, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        fdistill.distil  # noqa: B018
