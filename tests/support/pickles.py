"""Pickles laid out as the published network pickles are: what was an object of `torch_utils.persistence` there is one
here, with source text that would leave a file behind if anything ran it.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn


class EasyDict(dict):  # type: ignore[type-arg]
    """A dict of another name, as theirs."""


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> object:
    """What a plain `pickle.load` would call: it runs the source, as theirs does."""
    exec(meta["module_src"])
    return meta["class_name"]


EasyDict.__module__ = "dnnlib.util"
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """Pickled as class name, source text and state."""

    def __init__(self, class_name: str, marker: Path, state: dict[str, Any], *arguments: Any, **keywords: Any):
        self.class_name = class_name
        self.source = f"open({str(marker)!r}, 'w').close()"
        self.state = state | {"_init_args": arguments, "_init_kwargs": keywords}

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": self.class_name,
            "state": self.state,
        }
        return _reconstruct_persistent_obj, (meta,), None


def persistent(module: nn.Module, class_name: str, marker: Path, *arguments: Any, **keywords: Any) -> Persistent:
    """A module as theirs are pickled: itself and its submodules persistent, lists and dicts of modules torch's own."""
    children: dict[str, Any] = {
        name: child if child is None else _child(child, marker) for name, child in module._modules.items()
    }
    return Persistent(class_name, marker, {**_book_keeping(module), "_modules": children}, *arguments, **keywords)


def _child(child: nn.Module, marker: Path) -> Any:
    if not isinstance(child, (nn.ModuleDict, nn.ModuleList)):
        return persistent(child, type(child).__name__, marker, 1, of="something")
    copy = type(child)()
    copy.__dict__["_modules"] = {name: _child(inner, marker) for name, inner in child._modules.items() if inner}
    return copy


def _book_keeping(module: nn.Module) -> dict[str, Any]:
    """What every torch module holds beside its submodules."""
    names = vars(nn.Module()).keys() - {"_modules"}
    return {name: value for name, value in vars(module).items() if name in names}


@contextmanager
def published_names() -> Iterator[None]:
    """The modules in which pickle looks up what it writes by name; gone when the pickle is written."""
    names = {
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "dnnlib.util": {"EasyDict": EasyDict},
    }
    for name, attributes in names.items():
        package = name.split(".")[0]
        sys.modules[package], sys.modules[name] = ModuleType(package), ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name], sys.modules[name.split(".")[0]]


def dumps(content: object, protocol: int = 4) -> bytes:
    with published_names():
        return pickle.dumps(content, protocol)


def edm_content(network: nn.Module, marker: Path, class_name: str = "EDMPrecond", **keywords: Any) -> dict[str, Any]:
    """What an EDM snapshot holds."""
    return {
        "ema": persistent(network, class_name, marker, **keywords),
        "loss_fn": Persistent("EDMLoss", marker, {"P_mean": -1.2, "P_std": 1.2}),
        "augment_pipe": Persistent("AugmentPipe", marker, {"p": 0.12}, p=0.12),
        "dataset_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", path="data.zip"),
    }


def edm2_content(network: nn.Module, marker: Path, encoder: str | None, **keywords: Any) -> dict[str, Any]:
    """What an EDM2 snapshot holds."""
    scale = np.float32(0.5) / np.float32([4.17, 4.62, 3.71, 3.28])
    state = {"vae_name": "stabilityai/sd-vae-ft-mse", "scale": scale, "batch_size": np.int64(8), "_vae": None}
    content = EasyDict(dataset_kwargs=EasyDict(path="data.zip"), ema=persistent(network, "Precond", marker, **keywords))
    if encoder is not None:
        content["encoder"] = Persistent(encoder, marker, state if encoder == "StabilityVAEEncoder" else {})
    return content
