"""Pipeline folders of diffusers as files: their components, weights and hashes, and copies that share weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fdistill.base.errors import CheckpointError
from fdistill.base.files import (
    KEPT_SUFFIXES,
    is_variant,
    link_files,
    not_weights,
    read_json_object,
    sha256_of_files,
)

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a safetensors file that is missing, cut short, or something else."""
    what = not_weights(path)
    if what is not None:
        return CheckpointError(f"{path}: {what}")
    return CheckpointError(
        f"{path}: cannot be read as safetensors ({error}); the download may have been cut short: fetch it again"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; CheckpointError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file of a pipeline folder; CheckpointError if it is missing or no JSON object."""
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); expected a pipeline folder of diffusers") from error


def weight_files(component: Path) -> list[Path]:
    """The safetensors file of a component's folder, or its shards.

    Raises:
        CheckpointError: there is none, or the index of the shards names a file elsewhere.
    """
    for name in _WEIGHTS:
        index = component / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(read_config(index).get("weight_map", {}).values()))
            if not shards or any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards):
                raise CheckpointError(f"{index}: expected file names under weight_map, got {shards[:3]}")
            return [component / shard for shard in shards]
        if (component / name).is_file():
            return [component / name]
    raise CheckpointError(f"{component}: no weights; expected {' or '.join(_WEIGHTS)}")


def read_weights(component: Path) -> dict[str, Tensor]:
    """All tensors of a component's folder."""
    return {name: value for path in weight_files(component) for name, value in read_tensors(path).items()}


def weight_shapes(component: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a component's folder, without reading the tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(component):
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise unreadable(path, error) from error
    return shapes


def components(folder: Path) -> dict[str, str]:
    """Component name -> class name, from model_index.json of a pipeline folder; components it lacks are left out.

    Raises:
        CheckpointError: this is no pipeline folder.
    """
    index = read_config(folder / "model_index.json")
    return {
        name: str(value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] and Path(name).name == name
    }


def pipeline_files(folder: Path) -> list[Path]:
    """model_index.json and the files of the pipeline's components, in the order of their names.

    Without pickles, and without weights of another variant ("model.fp16.safetensors").
    """
    found = [folder / "model_index.json"]
    for name in components(folder):
        found += [path for path in (folder / name).rglob("*") if path.suffix in KEPT_SUFFIXES and path.is_file()]
    return sorted(path for path in found if not is_variant(path))


def pipeline_hashes(folder: Path) -> dict[str, str]:
    """Path below the folder -> hash, of each of the pipeline's files: what a folder made out of this one depends on."""
    return {path.relative_to(folder).as_posix(): sha256_of_files([path]) for path in pipeline_files(folder)}


def share_files(source: Path, target: Path, without: Iterable[str] = ()) -> None:
    """Gives `target` the pipeline files of `source`: weights as hard links if the disk allows them, the rest as copies.

    Args:
        without: names of components that stay behind.
    """
    found = pipeline_files(source)
    link_files([path for path in found if path.relative_to(source).parts[0] not in without], source, target)
