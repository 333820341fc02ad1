"""`fdistill demo`: a page that draws with a student, beside its teacher. Imports neither torch nor gradio by itself."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from fdistill.base.errors import ArgumentError
from fdistill.base.process import importing
from fdistill.commands.options import Device


def demo(
    student: Annotated[Path, typer.Argument(help="A student or run folder.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="What is shown beside it; by default the teacher that the student's folder names."),
    ] = None,
    device: Device = "auto",
    port: Annotated[
        int | None, typer.Option(help="Port of the page; by default the first free one from 7860 on.", min=1, max=65535)
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines see the page.")
    ] = "127.0.0.1",
    share: Annotated[
        bool, typer.Option("--share", help="Let anybody see the page for a week, through a server of Gradio's makers.")
    ] = False,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Draw with a student in the browser, beside its teacher.

    The page says what each image took.

    \b
    Example: fdistill demo runs/digits
    """
    if find_spec("gradio") is None:
        raise ArgumentError("demo: its page needs gradio; install it with pip install 'fdistill[demo]'")
    if port is not None:
        _check_free(host, port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    with tempfile.TemporaryDirectory(prefix="fdistill-demo-") as images:
        os.environ["GRADIO_TEMP_DIR"] = images
        with importing():
            from fdistill.base.devices import start
            from fdistill.commands.demo_page import CSS, build_page
            from fdistill.commands.side_by_side import open_pair

        page = build_page(open_pair(str(student), teacher, start(device)[1]))
        _, local, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            run_history=False,
            css=CSS,
        )
        typer.echo(f"demo: {public or local} (Ctrl-C ends it)")
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def _check_free(host: str, port: int) -> None:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise ArgumentError(
                f"port: {port} cannot be had at {host} ({error.strerror}); choose another one, or leave --port out"
            ) from error
