"""Tensors by name: taken from, and given to, modules and files."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fdistill.base.errors import CheckpointError


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each with memory of its own: safetensors holds no tensor twice, as networks with tied weights do."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        own = value.detach().cpu().contiguous()
        pointer = own.untyped_storage().data_ptr()
        found[name] = own.clone() if pointer in seen else own
        seen.add(pointer)
    return found


#: Put before the names of a network's tensors by torch.compile, at any depth, and by DistributedDataParallel.
_COMPILED, _PARALLEL = "_orig_mod.", "module."


def is_wrapped(names: Collection[str]) -> bool:
    """Whether a network's tensors have names that torch.compile or DistributedDataParallel gave them."""
    return any(_COMPILED in name for name in names) or (
        len(names) > 0 and all(name.startswith(_PARALLEL) for name in names)
    )


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that the network itself gives them."""
    found = {name.replace(_COMPILED, ""): value for name, value in tensors.items()}
    while is_wrapped(found):
        found = {name.removeprefix(_PARALLEL): value for name, value in found.items()}
    return found


def tensors_sha256(tensors: Mapping[str, Tensor], before: bytes = b"") -> str:
    """The hash, in hexadecimal, of names and values in their order, and of some bytes before them."""
    digest = hashlib.sha256(before)
    for name, value in tensors.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under "prefix.", without the prefix."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + ".")}


def load_exactly(module: torch.nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Loads a state dict whose names and shapes must be the module's own."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{what}: weights do not fit this architecture: {' '.join(str(error).split())[:400]}"
        ) from error
