"""Converts a state dict whose architecture another checkpoint knows: networks that FastGen, DMD2 or others trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fdistill.adapters.checkpoint import Checkpoint, find_network
from fdistill.base.errors import ArgumentError
from fdistill.base.files import KEPT_SUFFIXES, is_variant, link_files
from fdistill.formats.pipeline_folder import read_config
from fdistill.student_kinds import STUDENT_FILE
from fdistill.teachers.fitting import filled

_AUGMENTATION = "model.map_augment.weight"


def network_like(tensors: Mapping[str, Tensor], like: Checkpoint, source: Path) -> Any:
    """The network of another checkpoint's architecture with these tensors, in float32.

    Two differences change no sample and are allowed: a single number may be stored as a list of one, and the layer of
    augmentation labels, which are zeros in sampling, may be missing (DMD2 deletes it).

    Args:
        tensors: by the names of that network.
        like: the checkpoint; its weights are not read.
        source: the file of the tensors, for messages.

    Raises:
        CheckpointError: the other checkpoint cannot be read, or the tensors are not of its architecture.
    """
    folder = folder_of(like)
    family, place = find_network(folder)
    config = {name: value for name, value in read_config(place / "config.json").items() if not name.startswith("_")}
    if config.get("augment_dim") and _AUGMENTATION not in tensors:
        config["augment_dim"] = 0
    return filled(family.network, config, {name: _scalar(name, value) for name, value in tensors.items()}, source)


def folder_of(like: Checkpoint) -> Path:
    """The folder of a checkpoint; ArgumentError for a function of the user's own."""
    if like.folder is None:
        raise ArgumentError(f"like: {like.name!r} is a function; expected the folder or hub id of a checkpoint")
    return like.folder


def write_like(network: Any, like: Checkpoint, folder: Path) -> None:
    """Writes a network into a folder, and beside it all that the other checkpoint has beside its own network."""
    source = folder_of(like)
    _, place = find_network(source)
    files = [
        path
        for path in sorted(source.rglob("*"))
        if path.is_file()
        and path.suffix in KEPT_SUFFIXES
        and path.name != STUDENT_FILE
        and not is_variant(path)
        and not _of_network(path, place, source)
    ]
    link_files(files, source, folder)
    network.save_pretrained(folder / place.relative_to(source))


def _of_network(path: Path, place: Path, source: Path) -> bool:
    """Whether a file belongs to the network, which may stand in the same folder as everything else."""
    if place != source:
        return path.is_relative_to(place)
    return path.parent == source and (path.name == "config.json" or path.name.startswith("diffusion_pytorch_model"))


def _scalar(name: str, value: Tensor) -> Tensor:
    """FastGen stores the gain of EDM2's output as a list of one number, so that it can be sharded."""
    return value.reshape(()) if name.endswith(("out_gain", "emb_gain")) and value.numel() == 1 else value
