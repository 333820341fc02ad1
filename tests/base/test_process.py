"""What the command line asks of OpenMP and of Python before torch is imported."""

from __future__ import annotations

import gc
import os

import pytest

from fdistill.base.process import importing, set_up


@pytest.mark.parametrize("users", [None, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_threads_wait_shortly_unless_the_user_says_how(users: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {} if users is None else {users: "7"})
    set_up()
    assert os.environ == ({"GOMP_SPINCOUNT": "3000"} if users is None else {users: "7"})


def test_garbage_is_collected_again_after_an_import_that_failed() -> None:
    with pytest.raises(ZeroDivisionError), importing():
        _ = 1 // gc.isenabled()
    assert gc.isenabled()
