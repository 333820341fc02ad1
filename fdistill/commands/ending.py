"""How a command ends: with one message for an error or a signal, the exit status that goes with it, and no warnings of
libraries in between.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from fdistill.base.errors import FDistillError, StoppedError
from fdistill.base.reading import reason_of
from fdistill.base.signals import SIGNALS
from fdistill.commands.options import is_main_process

_LIBRARIES = ("PIL", "diffusers", "transformers", "peft", "torch", "accelerate", "huggingface_hub")


def quiet_libraries() -> None:
    """Silences what libraries tell a programmer in warnings and logs, which is no use to who runs a command."""
    for library in _LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}\b")
        os.environ.setdefault(f"{library.upper()}_VERBOSITY", "error")


@contextmanager
def one_message() -> Iterator[None]:
    """Ends the program with one message where the block raises what a user can put right, or a signal comes.

    The status is 1, and 128 plus the number of the signal for SIGTERM, Ctrl-C and SIGUSR1.
    """
    before = {number: signal.signal(number, _end) for number in SIGNALS}
    try:
        yield
    except StoppedError as stopped:
        if is_main_process():
            typer.secho(str(stopped), err=True)
        raise SystemExit(stopped.status) from None
    except FDistillError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        device = "the device's memory" if type(error).__name__ == "OutOfMemoryError" else "memory"
        typer.secho(
            f"error: {device} does not suffice ({reason_of(error)[:200]}); choose a smaller batch (--batch-size; for "
            "distill, batch_size or gradient_checkpointing=true), or a device with more memory",
            fg="red",
            err=True,
        )
        raise SystemExit(1) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        typer.secho(
            f"error: {where}{error.strerror or error}; check that it exists and may be used", fg="red", err=True
        )
        raise SystemExit(1) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether Python or torch had no memory; torch's allocator for CPUs has no class of error of its own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "DefaultCPUAllocator" in str(error) or "not enough memory" in str(error)


def _end(number: int, frame: FrameType | None) -> None:
    """Ends the command as an error would, so that nothing half-written is left."""
    os.write(2, f"\n{signal.Signals(number).name}: ended\n".encode())
    raise SystemExit(128 + number)
