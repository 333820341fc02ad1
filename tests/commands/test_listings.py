"""`fdistill` alone, and the commands that list what there is to choose from."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from evaluation.protocols import PROTOCOLS
from fdistill.commands.cli import app
from fdistill.commands.listings import START
from fdistill.config.reading import embedded_configs, load_config
from fdistill.divergence import DIVERGENCES, get_divergence
from fdistill.methods import METHODS

ROOT = Path(__file__).parent.parent.parent


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "90"})
    assert result.exit_code == 0, result.output
    return result.output


def names(output: str) -> list[str]:
    """The lines that are not indented, but for the sentences at the end, which say how to choose."""
    return [line for line in output.splitlines() if line and not line.startswith(" ") and "NAME" not in line]


def test_alone_it_shows_the_three_uses_with_commands_that_exist() -> None:
    assert printed() == START
    known = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    words = [line.split("#")[0].split() for line in START.splitlines() if line.startswith("    fdistill")]
    assert len(words) == 11
    assert all(command[1] in known for command in words)
    assert {"distill", "generate", "evaluate", "inspect", "configs", "protocols"} <= {command[1] for command in words}


def test_configs_are_all_there_with_what_they_reach_and_need() -> None:
    output = printed("configs")
    assert (
        names(output)
        == [path.stem for path in embedded_configs()]
        == sorted(path.stem for path in ROOT.glob("configs/*.yaml"))
    )
    count, recipes = len(embedded_configs()), output.count("    run here    not yet")
    assert output.count("    trains on ") == output.count("    needs ") == count
    assert recipes == sum("smoke:" in path.read_text() for path in embedded_configs())
    assert output.count("    published ") == output.count("    hours ") == recipes
    assert not re.search(r";\n {0,4}\S", output), "a text is cut off"
    assert output.count("    reached ") == count - recipes
    assert all(len(line) <= 90 for line in output.splitlines())
    assert "2 CPU cores without a GPU" in output
    load_config(names(output)[0])


def test_methods_are_all_there_with_pages_that_exist() -> None:
    output = printed("methods")
    assert names(output) == list(METHODS)
    pages = [line.split()[-1] for line in output.splitlines() if "about it" in line]
    assert len(pages) == len(METHODS)
    assert all((ROOT / page).is_file() for page in pages)


def test_divergences_have_the_weight_that_is_printed() -> None:
    output = printed("divergences")
    assert names(output) == [*DIVERGENCES, "alpha(a)", "module:function"]
    lines = output.splitlines()
    r = torch.linspace(0.1, 5, 20, dtype=torch.float64)
    for name in DIVERGENCES:
        formula = lines[lines.index(name) + 1].split("= ", 1)[1]
        said = formula.replace(" ", " * ").replace("(1 * + * r)", "(1 + r)").replace("^", "**")
        value = eval(said, {"r": r}) * torch.ones_like(r)
        torch.testing.assert_close(value, get_divergence(name).weight(r))
        short = lines[lines.index(name) + 2].split()
        assert short[:2] == ["in", "short"]
        assert all(get_divergence(alias.strip(",")).name == name for alias in short[2:])


def test_protocols_are_all_there() -> None:
    output = printed("protocols")
    assert names(output) == list(PROTOCOLS)
    assert "1,797 samples" in output
    assert output.count("    against ") == len(PROTOCOLS)
    assert output.count("    needs ") == sum(protocol.embedded is None for protocol in PROTOCOLS.values())


@pytest.mark.parametrize("command", ["configs", "methods"])
def test_what_needs_no_torch_imports_none(command: str) -> None:
    run = f"from fdistill.commands.cli import app; app(['{command}'], standalone_mode=False)"
    code = f"import sys; {run}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_the_tab_key_completes_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bash asks, once `--install-completion` has told it whom."""
    assert "--install-completion" in printed("--help")
    for name, value in {"_FDISTILL_COMPLETE": "complete_bash", "COMP_WORDS": "fdistill di", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(name, value)
    program = shutil.which("fdistill", path=str(Path(sys.executable).parent))
    assert program is not None
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["distill", "divergences"]
