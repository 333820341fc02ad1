"""Wheel and sdist: what is in them, and that they work where there is no checkout.

The environments they are installed into are empty, but see the dependencies that the tests themselves have.
scripts/check_packages.sh installs the dependencies as well, with several versions of Python and torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import fdistill

ROOT = Path(__file__).parent.parent
#: What the tests of a user's program read of the packages; types of other libraries would take a minute.
MYPY = """[mypy]
strict = true
[mypy-torch.*,diffusers.*,transformers.*,accelerate.*,numpy.*,PIL.*,matplotlib.*,open_clip.*,torch_fidelity.*,tqdm.*]
ignore_missing_imports = true
follow_imports = skip
[mypy-safetensors.*,einops.*,huggingface_hub.*,datasets.*,sklearn.*,scipy.*,triton.*,bitsandbytes.*,typer.*,pydantic.*]
ignore_missing_imports = true
follow_imports = skip
"""
PROGRAM = """import fdistill
from evaluation.evaluate import evaluate
reveal_type(fdistill.distill)
reveal_type(evaluate)
fdistill.distil
fdistill.distill("digits", output=3)
"""


def run(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """What a command prints, which knows of no checkout."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == status, done.stdout[-3000:]
    return done.stdout


def build(kind: str, source: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", folder, source, cwd=folder)
    (package,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return package


def installed(package: Path, folder: Path) -> Path:
    """The programs of a new environment with this package."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, package, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(wheel, tmp_path_factory.mktemp("environment"))


def in_checkout(folder: str) -> set[str]:
    """Files that git knows, or would."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", folder, cwd=ROOT)
    return {name for name in listed.splitlines() if (ROOT / name).is_file()}


def test_the_wheel_has_all_of_both_packages_and_the_configs_and_nothing_else(wheel: Path) -> None:
    info = f"fdistill-{fdistill.__version__}.dist-info/"
    found = {name for name in names_in(wheel) if not name.startswith(info)}
    assert found == in_checkout("fdistill") | in_checkout("evaluation") | {
        f"fdistill/{name}" for name in in_checkout("configs")
    }
    assert {"fdistill/py.typed", "evaluation/py.typed", "fdistill/configs/digits.yaml"} <= found
    assert {f"{info}licenses/LICENSE", f"{info}entry_points.txt"} <= names_in(wheel)


def test_an_installed_wheel_works_outside_the_checkout(programs: Path, tmp_path: Path) -> None:
    assert "Usage: fdistill" in run(programs / "fdistill", "--help", cwd=tmp_path)
    assert "digits-t2i" in run(programs / "fdistill", "configs", cwd=tmp_path)
    run(programs / "fdistill", "distill", "digits", "iterations=2", "--output", "run", cwd=tmp_path)
    code = "import evaluation, fdistill; print(evaluation.__file__, fdistill.__file__)"
    assert run(programs / "python", "-c", code, cwd=tmp_path).count(str(programs.parent)) == 2


@pytest.mark.thorough
def test_type_checkers_see_the_types_of_an_installed_wheel(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "program.py").write_text(PROGRAM)
    said = run(
        sys.executable, "-m", "mypy", "--python-executable", programs / "python", "program.py", cwd=tmp_path, status=1
    ).splitlines()
    about = {line.split(":")[1]: line for line in said if line.startswith("program.py:")}
    assert "resume: bool" in about["3"]
    assert "seeds: typing.Sequence[" in about["4"]
    assert 'has no attribute "distil"' in about["5"]
    assert "[arg-type]" in about["6"]
    assert len(about) == 4, said


@pytest.mark.thorough
def test_the_sdist_has_what_makes_the_same_wheel_and_the_tests(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "sdist").mkdir()
    (tmp_path / "again").mkdir()
    with tarfile.open(build("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert names_in(build("wheel", source, tmp_path / "again")) == names_in(wheel)
    for name in ("tests/test_packages.py", "scripts/test.sh", "docs/tutorial.ipynb", "CHANGELOG.md", "CITATION.cff"):
        assert (source / name).is_file(), name
