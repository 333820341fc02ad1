"""The signals that end a command in order: SIGTERM, Ctrl-C, and SIGUSR1, which SLURM sends before a time limit."""

from __future__ import annotations

import signal

#: Windows has no SIGUSR1.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
