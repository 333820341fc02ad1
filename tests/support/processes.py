"""Real processes over gloo, as torchrun starts them, on the CPU with one thread each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def launch(arguments: Sequence[str]) -> None:
    """A script, or a module, with its arguments in two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [sys.executable, *torchrun, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def launch_commands(commands: Sequence[Sequence[str]], folder: Path, setting: str = "") -> None:
    """Several of fdistill's commands, one after the other, in the same processes: to start them takes longest.

    Args:
        folder: for a script.
        setting: Python that runs first, if any.
    """
    script = folder / "commands.py"
    script.write_text(
        f"import json\n\nfrom fdistill.commands.cli import app\n{setting}\n"
        f"for arguments in json.loads({json.dumps(commands)!r}):\n    app(arguments, standalone_mode=False)\n"
    )
    launch([str(script)])
