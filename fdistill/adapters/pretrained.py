"""Loads networks in diffusers' format (config.json and safetensors); every tensor must fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from diffusers import ModelMixin
from safetensors import SafetensorError

from fdistill.base.errors import CheckpointError
from fdistill.base.files import not_weights, read_json_object
from fdistill.base.network_sizes import check_sizes

Network = TypeVar("Network", bound=ModelMixin)

#: What diffusers and transformers raise for components that they cannot load.
LOADING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    ImportError,  # of a library that quantized weights need
    NameError,  # of a library that watermarks need
    SafetensorError,
)


@contextmanager
def quiet_diffusers(module: str) -> Iterator[None]:
    """Silences the log messages of this module of diffusers."""
    logger = logging.getLogger(f"diffusers.{module}")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def check_size(folder: Path) -> None:
    """Raises CheckpointError if config.json of a component asks for more or larger layers than any network has, which
    would take all memory before the weights are looked at. What cannot be read is left to the library that loads it.
    """
    path = folder / "config.json"
    try:
        settings = read_json_object(path)
    except (OSError, ValueError):
        return
    try:
        check_sizes(settings)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; expected the config that belongs to the weights") from error


def load_network(cls: type[Network], folder: Path) -> Network:
    """Loads the network in a folder with config.json and diffusion_pytorch_model.safetensors.

    Raises:
        CheckpointError: a file is missing, truncated, or does not fit the architecture its config names.
    """
    check_size(folder)
    try:
        with quiet_diffusers("models.modeling_utils"):  # its messages are part of the error below
            network, info = cls.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except LOADING_ERRORS as error:
        for path in sorted(folder.glob("*.safetensors")):
            what = not_weights(path)
            if what is not None:
                raise CheckpointError(f"{path}: {what}") from error
        raise CheckpointError(
            f"{folder}: cannot load the weights ({' '.join(str(error).split())[:400]}); "
            "expected a complete diffusion_pytorch_model.safetensors that fits config.json"
        ) from error
    wrong = {
        key: names
        for key, names in info.items()
        if names and key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if wrong:
        listed = "; ".join(
            f"{len(names)} {key.replace('_', ' ')} such as {next(iter(names))}" for key, names in wrong.items()
        )
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {listed}")
    loaded: Network = network
    return loaded
