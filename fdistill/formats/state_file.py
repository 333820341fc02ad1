"""State dicts of networks trained elsewhere: which of a file's networks is meant, and its tensors without wrappers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.base.files import made_once, sha256_of_files
from fdistill.base.state_dicts import is_wrapped, unshared, unwrapped
from fdistill.base.torch_files import is_state_dict, read_torch_file, tensor_names

#: The networks that take part in training a student beside it; a file that holds one of them is of such a training.
_OTHER_ROLES = ("fake_score", "discriminator", "guidance_model")
#: What a file calls its network, other than an average of it.
_NETWORKS = ("net", "model", "state_dict", "generator", "")
#: Put before the names of all tensors by those who wrap a network: DMD2, FastGen.
_WRAPPERS = ("feedforward_model.", "unet.", "transformer.")


@dataclass(frozen=True)
class StateFile:
    """The network that is meant in a file of tensors.

    Attributes:
        tensors: by the names that its publisher gives them.
        name: what the file calls this network, as "ema_9999"; "" in a file that holds one network alone.
        of_training: whether the file is of the training of a student, whose fake score it holds too.
        arguments: what its training was started with, where the file says so.
    """

    tensors: dict[str, Tensor]
    name: str
    of_training: bool
    arguments: Mapping[str, Any]


def read_state_file(path: Path, weights: str | None = None) -> StateFile:
    """Reads a state dict: flat, under "ema", "model" or "state_dict", or a training checkpoint of FastGen.

    Args:
        path: a file of torch.save or a safetensors file.
        weights: which network of the file; by default its only average, or else its only network.

    Raises:
        CheckpointError: the file cannot be read, or holds no network.
        ArgumentError: the file holds several networks and `weights` is not one of them.
    """
    content = read_torch_file(path)
    found = _state_dicts(content)
    if not found:
        raise CheckpointError(
            f"{path}: holds no state dict; expected a dict of tensors by name, or one under 'ema' or 'model'"
        )
    of_training = any(name.startswith(_OTHER_ROLES) for name in [*found, *found.get("", ())])
    name = _chosen(list(found), weights, path)
    arguments = content.get("args")
    said = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return StateFile(_unwrapped(found[name]), name, of_training, said)


def as_safetensors(path: Path, weights: str | None = None) -> Path:
    """A file of torch.save as a safetensors file, made once and cached; a safetensors file stays itself, unless its
    names have what torch.compile or DistributedDataParallel put before them.

    Raises:
        CheckpointError, ArgumentError: see `read_state_file`.
        OutputError: the cache folder cannot be written.
    """
    if path.suffix.lower() == ".safetensors" and weights is None and not is_wrapped(tensor_names(path)):
        return path
    try:
        key = {"file": sha256_of_files([path]), "weights": weights, "format": 1}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    name = f"{path.stem}.safetensors"

    def fill(folder: Path) -> None:
        save_file(unshared(read_state_file(path, weights).tensors), folder / name, {"format": "pt"})

    (made,) = made_once("state-dict", key | {"name": name}, fill).iterdir()
    return made


def _state_dicts(content: Any) -> dict[str, dict[str, Tensor]]:
    """What the file calls each of its networks -> its tensors; "" for a file that is a state dict itself."""
    if not isinstance(content, Mapping):
        return {}
    if is_state_dict(content):
        return {"": dict(content)}
    inner = content.get("model")
    if isinstance(inner, Mapping) and not is_state_dict(inner):  # FastGen: networks by their roles
        return {str(name): dict(value) for name, value in inner.items() if is_state_dict(value)}
    return {str(name): dict(value) for name, value in content.items() if is_state_dict(value)}


def _chosen(names: list[str], weights: str | None, path: Path) -> str:
    if weights is not None:
        if weights not in names:
            known = ", ".join(filter(None, names)) or "one network without a name; leave it out"
            raise ArgumentError(f"weights: got {weights!r}, but {path} holds {known}")
        return weights
    averages = [name for name in names if name.startswith("ema")]
    networks = [name for name in names if name in _NETWORKS]
    for candidates in (averages, networks, names):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            break
    raise ArgumentError(f"weights: {path} holds {', '.join(names)}; pass the one that is meant")


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what was put around the network in training, and without FastGen's estimate of its own uncertainty."""
    found = unwrapped(tensors)
    student = {name: value for name, value in found.items() if name.startswith(_WRAPPERS[0])}
    found = student or found
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in found):
            found = unwrapped({name.removeprefix(wrapper): value for name, value in found.items()})
    has_own = any(name.startswith("logvar_fourier.") for name in found)  # EDM2
    return {
        name: value
        for name, value in found.items()
        if not (name.startswith("model.logvar_linear.") or (name.startswith("logvar_linear.") and not has_own))
    }
