"""Signs of life between the processes of a command, so that none waits in silence for one that has stopped.

The main process has a connection to every other one. Both ends send a byte every few seconds from a thread, whatever
their process computes meanwhile. A process may therefore compute alone for hours, as when it encodes prompts, and is
waited for; one that has been stopped or killed is named, and is waited for only so long.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from fdistill.base.errors import ConfigError, StoppedError

#: Minutes for which a process that gives no sign of life is waited for.
PATIENCE = "FDISTILL_PATIENCE"
_DEFAULT_PATIENCE = 20.0
_BEAT, _BYE, _FAILED = b".", b"!", b"#"
_CONNECTING = 60.0  # seconds


@dataclass(frozen=True)
class Rhythm:
    """Seconds: between two signs of life, of silence before it is told, and of silence before the process ends; and
    between the end of another process and that of this one, which may first say why it ends itself.
    """

    beat: float
    told: float
    limit: float
    grace: float = 15.0


def patience() -> Rhythm:
    """The rhythm that the environment asks for; ConfigError if $FDISTILL_PATIENCE is no number of minutes above 0."""
    text = os.environ.get(PATIENCE, str(_DEFAULT_PATIENCE))
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise ConfigError(f"{PATIENCE}: got {text!r}; expected minutes above 0, such as {_DEFAULT_PATIENCE:g}")
    return Rhythm(beat=min(5.0, minutes * 6), told=min(60.0, minutes * 30), limit=minutes * 60)


_started = False
_connections: list[socket.socket] = []


def watch_processes() -> None:
    """Starts to watch the processes of torch.distributed, once; every process must call it.

    A process that is waited for in vain ends this one with status 1.
    """
    global _started
    address = os.environ.get("MASTER_ADDR")
    if _started or not address or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    _started = True
    rhythm, rank = patience(), dist.get_rank()
    server = socket.create_server(("", 0), backlog=dist.get_world_size()) if rank == 0 else None
    port: list[Any] = [server.getsockname()[1] if server else None]
    dist.broadcast_object_list(port)
    try:
        if server is None:
            connection = socket.create_connection((address, int(port[0])), timeout=_CONNECTING)
            connection.sendall(f"process {rank} (pid {os.getpid()} on {socket.gethostname()})\n".encode())
            _watch_in_thread(connection, "process 0, the main one", rhythm)
            return
        with server:
            server.settimeout(_CONNECTING)
            for _ in range(dist.get_world_size() - 1):
                connection, _ = server.accept()
                connection.settimeout(_CONNECTING)
                _watch_in_thread(connection, connection.makefile("r", newline="\n").readline().strip(), rhythm)
    except OSError as error:
        _say(f"process {rank}: no connection for signs of life ({error}); one that stops is waited for in silence")


def _watch_in_thread(connection: socket.socket, name: str, rhythm: Rhythm) -> None:
    _connections.append(connection)
    atexit.register(_say_bye, connection)
    threading.Thread(target=_watch, args=(connection, name, rhythm), daemon=True).start()


def _say_bye(connection: socket.socket) -> None:
    with suppress(OSError):  # the other process has ended already
        connection.sendall(_BYE)


@contextmanager
def telling_others() -> Iterator[None]:
    """Tells the other processes of an error that ends the block, so that none waits for this process in vain."""
    try:
        yield
    except StoppedError:  # a signal, on which all have agreed
        raise
    except Exception as error:
        _tell_failure(f"{type(error).__name__}: {error}")
        raise


def _tell_failure(text: str) -> None:
    for connection in _connections:
        with suppress(OSError):
            connection.sendall(_FAILED + " ".join(text.split())[:2000].encode() + b"\n")


def _watch(connection: socket.socket, name: str, rhythm: Rhythm) -> None:
    """Gives and expects signs of life until the other process says that it ends."""
    connection.settimeout(rhythm.beat)
    silent, told = 0.0, False
    while silent < rhythm.limit:
        heard = _exchange(connection)
        if heard is not None and _FAILED in heard:
            failure = heard.partition(_FAILED)[2].partition(b"\n")[0]
            _end(f"{name} has failed: {failure.decode(errors='replace')}", rhythm)
            return
        if heard is not None and _BYE in heard:
            return
        if heard == b"":  # the connection is closed
            _end(f"{name} has ended without a word", rhythm)
            return
        if heard:
            if told:
                _say(f"{name} answers again")
            silent, told = 0.0, False
            time.sleep(rhythm.beat)
            continue
        silent += rhythm.beat
        if silent >= rhythm.told and not told:
            minutes = rhythm.limit / 60
            _say(
                f"waiting for {name}: it has given no sign of life for {silent:.0f} s; the limit is {minutes:g} min "
                f"({PATIENCE})"
            )
            told = True
    _end(f"{name} gave no sign of life for {rhythm.limit / 60:g} min", replace(rhythm, grace=0))


def _end(what: str, rhythm: Rhythm) -> None:
    """Ends this process, unless it has ended by itself before, and tells the others why."""
    time.sleep(rhythm.grace)
    _tell_failure(what)
    _say(f"error: {what}; run again, a run of distill with --resume")
    sys.stderr.flush()
    os._exit(1)  # the main thread waits inside a collective, where nothing else reaches it


def _exchange(connection: socket.socket) -> bytes | None:
    """Sends a sign of life; what has come, empty if the other process has ended, or None if nothing came in time."""
    try:
        connection.sendall(_BEAT)
        return connection.recv(4096)
    except TimeoutError:
        return None
    except OSError:
        return b""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
