"""Files of `torch.save`, read by torch's restricted loader: it builds tensors and containers, and runs nothing."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fdistill.base.errors import CheckpointError, brief
from fdistill.base.files import not_weights


def is_state_dict(value: Any) -> bool:
    """Whether a value is a dict of tensors by name, and not empty."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file; none if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        return []


def read_torch_file(path: Path) -> Any:
    """What a file of torch.save or a safetensors file holds, on the CPU.

    Args:
        path: the file; a name that ends in .safetensors says that it is one.

    Raises:
        CheckpointError: the file is damaged, missing, or names anything that tensors do not need, such as a function
            to call; nothing of it is run.
    """
    what = not_weights(path)
    if what is not None:
        raise CheckpointError(f"{path}: {what}")
    try:
        if path.suffix.lower() == ".safetensors":
            return dict(load_file(path))
        # Training checkpoints hold their command line in a Namespace, a class that only stores values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises nearly any exception on damaged bytes
        reason = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
        named = re.search(r"GLOBAL (\S+)", reason)
        raise CheckpointError(
            f"{path}: refused {named[1]}, which no state dict needs; no code was run; expected tensors alone"
            if named
            else f"{path}: cannot be read ({reason[:200] or type(error).__name__}); expected a file of tensors"
        ) from error


def read_state_dict(path: Path, within: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU: of .safetensors, or of a dict of tensors by torch.save.

    Nothing in the file is executed.

    Args:
        within: the key of the tensors in a file of torch.save that holds more beside them, if it has that key.

    Raises:
        CheckpointError: the file is unreadable, is a TorchScript archive, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        zipped = zipfile.is_zipfile(path)
        if zipped and _is_torchscript(path):
            raise CheckpointError(
                f"{path}: is a TorchScript archive, which is a program and is not run; expected plain tensors (for "
                "CLIP, open_clip_model.safetensors from the model's Hugging Face repository)"
            )
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, or is damaged, and is not executed ({brief(error)}); expected a state "
            "dict as published, or .safetensors"
        ) from error
    except Exception as error:  # torch's reader raises nearly any exception on damaged bytes
        raise CheckpointError(
            f"{path}: cannot be read as weights ({brief(error)}); expected .safetensors or a state dict written by "
            "torch.save, so download it again"
        ) from error
    if within is not None and isinstance(state, Mapping) and within in state:
        state = state[within]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: expected tensors by name, got {type(state).__name__}; pass a state dict")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: expected tensors by name, got {type(value).__name__} for {name!r}; pass the state dict alone"
            )
    return dict(state)


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
