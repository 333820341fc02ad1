"""scripts/newcomer.sh runs what docs/first-hour.md says, and nothing else."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_script_takes_its_commands_from_the_page() -> None:
    text = (ROOT / "scripts" / "newcomer.sh").read_text(encoding="utf-8")
    (picked,) = re.findall(r"< <\((awk '.*?' docs/first-hour\.md)\)", text)
    found = subprocess.run(["bash", "-c", picked], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    assert found == "".join(blocks)
    for step in ("quickstart.sh", "inspect", "--dry-run", "--smoke", "report", "evaluate", "export"):
        assert step in found, step


def test_the_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "scripts" / "newcomer.sh")], check=True)
