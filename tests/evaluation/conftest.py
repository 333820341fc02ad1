"""What tests of several measurements read."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.inception import write_inception


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inception(tmp_path_factory.mktemp("inception"))
