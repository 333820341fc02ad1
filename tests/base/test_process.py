"""What the command line asks of Python before torch is imported."""

from __future__ import annotations

import gc

import pytest

from fdistill.base.process import importing


def test_garbage_is_collected_again_after_an_import_that_failed() -> None:
    with pytest.raises(ZeroDivisionError), importing():
        _ = 1 // gc.isenabled()
    assert gc.isenabled()
