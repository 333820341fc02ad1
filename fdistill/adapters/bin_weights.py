"""Folders whose weights are not what everything else reads: safetensors under the names of diffusers and transformers.

Files of torch.save (.bin), half-precision weights alone (model.fp16.safetensors), and tensors with names of
torch.compile or DistributedDataParallel are made into a folder with plain safetensors before anything reads them. For
processes that share the memory of weights, so are those in half precision.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fdistill.base.errors import CheckpointError
from fdistill.base.files import KEPT_SUFFIXES, is_variant, link_files, made_once, read_json_object, sha256_of_files
from fdistill.base.state_dicts import is_wrapped, unshared, unwrapped
from fdistill.base.torch_files import is_state_dict, read_torch_file, tensor_names

#: The weights of a component in safetensors, of diffusers and of transformers.
_SAFE = ("diffusion_pytorch_model.safetensors", "model.safetensors")
#: The same weights as files of torch.save.
_BINS = ("diffusion_pytorch_model.bin", "pytorch_model.bin")
#: In the names of half-precision weights, which are read where there are no others.
_VARIANT = ".fp16"
_UNUSED = ("safety_checker",)


def with_plain_weights(folder: Path) -> Path:
    """The folder itself if all its components have weights in safetensors; otherwise a copy that has, made once.

    A component is a folder with config.json: this one, or one in it. Its .bin files are read by torch's restricted
    loader, which builds tensors and runs nothing. Files of other kinds are shared with the copy.

    Returns:
        The folder, or $FDISTILL_CACHE/safetensors/<hash of its files>.

    Raises:
        CheckpointError: a .bin file is damaged, or holds anything but a dict of tensors.
        OutputError: the cache folder cannot be written.
    """
    rewritten = {component: files for component in _components(folder) if (files := _to_rewrite(component))}
    if not rewritten:
        return folder
    read = [path for files in rewritten.values() for path in files]
    kept = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix in KEPT_SUFFIXES
        and not (is_variant(path) or path in read or ".bin." in path.name)
    ]
    key = {path.relative_to(folder).as_posix(): sha256_of_files([path]) for path in (*kept, *read)}

    def fill(temporary: Path) -> None:
        link_files(kept, folder, temporary)
        for component, files in rewritten.items():
            _write(component, files, temporary / component.relative_to(folder))

    return made_once("safetensors", key | {"format": "1"}, fill)


def in_float32(component: Path) -> Path:
    """A component's folder itself if its weights are float32; otherwise a copy in which they are, made once.

    Processes of one machine share the memory of float32 files that they read; what is converted when it is read, each
    of them has for itself.

    Returns:
        The folder, or $FDISTILL_CACHE/float32/<hash of its files>.

    Raises:
        OutputError: the cache folder cannot be written.
    """
    files = [path for path in sorted(component.glob("*.safetensors")) if not is_variant(path)]
    if all(_is_float32(path) for path in files):
        return component
    described = component / "config.json"

    def fill(temporary: Path) -> None:
        link_files([described], component, temporary)
        _write(component, files, temporary, torch.float32)

    return made_once("float32", {path.name: sha256_of_files([path]) for path in (described, *files)}, fill)


def _is_float32(path: Path) -> bool:
    """Whether a file has no weights in another precision; a file that cannot be read is left to what loads it."""
    try:
        with safe_open(path, framework="pt") as file:
            dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):
        return True
    return not any(dtype != "F32" and dtype.startswith(("F", "BF")) for dtype in dtypes)


def bins_instead(folder: Path) -> list[str]:
    """Patterns of the .bin files to download for the components of a folder that came without safetensors."""
    lacking = [component for component in _components(folder) if not _has_safetensors(component)]
    return [
        pattern
        for component in lacking
        for pattern in (
            ["diffusion_pytorch_model*.bin"] if component == folder else [f"{component.relative_to(folder)}/*.bin"]
        )
    ]


def variants_instead(folder: Path) -> list[str]:
    """Patterns of the half-precision files to download for the components of a folder that came without weights."""
    lacking = [part for part in _components(folder) if not (_has_safetensors(part) or _to_rewrite(part))]
    return [(part.relative_to(folder) / f"*{_VARIANT}*").as_posix() for part in lacking]


def _components(folder: Path) -> list[Path]:
    """The folders in a folder, and itself, that hold config.json, and so weights."""
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in _UNUSED]
    return [path for path in (folder, *inner) if (path / "config.json").is_file()]


def _has_safetensors(component: Path) -> bool:
    return any((component / name).is_file() or (component / f"{name}.index.json").is_file() for name in _SAFE)


def _to_rewrite(component: Path) -> list[Path]:
    """The file of a component's weights, or its shards, if they are not what everything else reads; otherwise []."""
    if _has_safetensors(component):
        files = [path for path in sorted(component.glob("*.safetensors")) if not is_variant(path)]
        return files if any(is_wrapped(tensor_names(path)) for path in files) else []
    for variant, names in (("", _BINS), (_VARIANT, _SAFE), (_VARIANT, _BINS)):
        for name in names:
            index = component / f"{name}.index{variant}.json"
            if index.is_file():
                return [component / shard for shard in sorted(set(_shards(index).values()))]
            stem, _, suffix = name.rpartition(".")
            if (component / f"{stem}{variant}.{suffix}").is_file():
                return [component / f"{stem}{variant}.{suffix}"]
    return []


def _shards(index: Path) -> dict[str, str]:
    """Name of a tensor -> the file that holds it, in the same folder."""
    try:
        shards = read_json_object(index).get("weight_map")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: cannot be read ({error}); download it again") from error
    if not isinstance(shards, dict) or any(
        not isinstance(name, str) or Path(name).name != name for name in shards.values()
    ):
        raise CheckpointError(f"{index}: expected file names under weight_map; download it again")
    return shards


def _write(component: Path, files: list[Path], target: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the tensors of files as the safetensors that diffusers or transformers looks for, in a dtype if one is
    given.
    """
    try:
        of_diffusers = "_class_name" in read_json_object(component / "config.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{component / 'config.json'}: cannot be read ({error})") from error
    name, _, suffix = _SAFE[0 if of_diffusers else 1].partition(".")
    target.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, path in enumerate(files, 1):
        shard = f"{name}-{number:05d}-of-{len(files):05d}.{suffix}" if len(files) > 1 else f"{name}.{suffix}"
        tensors = _tensors(path)
        if dtype is not None:
            tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
        save_file(unshared(tensors), target / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    if len(files) > 1:
        size = sum((target / shard).stat().st_size for shard in set(weight_map.values()))
        index: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (target / f"{name}.{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensors(path: Path) -> dict[str, Tensor]:
    content = read_torch_file(path)
    if not is_state_dict(content):
        raise CheckpointError(f"{path}: holds no state dict; expected a dict of tensors by name")
    return unwrapped(content)
