"""Checkpoints of one file, as model sites have them, made into pipeline folders by diffusers' own converters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fdistill.adapters import FAMILIES, network_components, original_layout
from fdistill.adapters.family import Shapes
from fdistill.adapters.original_names import assemble
from fdistill.base.errors import CheckpointError
from fdistill.base.files import made_once, sha256_of_files
from fdistill.formats.comfy import NETWORK
from fdistill.formats.own_word import MARKS, own_scheduler
from fdistill.formats.pipeline_folder import (
    components,
    pipeline_hashes,
    read_config,
    read_tensors,
    share_files,
    unreadable,
)
from fdistill.formats.state_file import as_safetensors

_LORA_KEYS = (".lora_A.", ".lora_down.", "_lora.down.", ".lora.down.")
_AUTOENCODER = ("first_stage_model.", "vae.")
#: Text encoders that a checkpoint of Stable Diffusion holds: a tensor name's start -> the component.
_TEXT_ENCODERS = {
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.": "text_encoder",
    "conditioner.embedders.1.": "text_encoder_2",
}


def single_file_to_folder(path: Path, base: Path | None) -> Path:
    """A checkpoint under its publisher's tensor names as an ordinary pipeline folder, made once and cached.

    The network, the autoencoder, and the text encoders of Stable Diffusion 1, 2 and XL come from the file. Whatever it
    lacks comes from the base, and so do configs, tokenizers, the scheduler (which says what the network predicts,
    unless the file does), and the text encoders of SD3 and Flux, which fine-tunes leave as they are. Half precision
    stays. Nothing is downloaded.

    Args:
        path: a safetensors file, or one that torch's restricted loader reads, of a kind that a family lists in its
            `single_files`: a whole checkpoint or the network alone; or a network under diffusers' names.
        base: folder of the published pipeline that the checkpoint was trained from.

    Returns:
        $FDISTILL_CACHE/single-file/<hash of the file and of the base>.

    Raises:
        CheckpointError: the file is truncated, holds more than tensors, is a LoRA or of an unknown kind; or there is no
            base, or another than the checkpoint was trained from, by its tensors or by its own word.
        OutputError: the cache folder cannot be written.
    """
    path = as_safetensors(path)
    shapes = _read_shapes(path)
    kind = _kind(path, shapes)
    if base is None:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: is {kind or 'a network under the names of diffusers'}; set teacher_base to the "
            "folder or hub id of the pipeline it was trained from, which gives configs, tokenizer and scheduler"
        )
    _check_base(path, kind, base)
    _check_network(path, shapes, kind, base)
    scheduler = _scheduler(path, shapes, base)
    key = {"file": sha256_of_files([path]), "base": pipeline_hashes(base), "name": path.name, "format": 3}

    def fill(folder: Path) -> None:
        made = _convert(path, shapes, kind, base)
        share_files(base, folder, without=made)
        for name, component in made.items():
            component.save_pretrained(folder / name)
        if scheduler:
            text = json.dumps(scheduler, indent=2) + "\n"
            (folder / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")

    return made_once("single-file", key, fill)


def _read_shapes(path: Path) -> Shapes:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error


def _scheduler(path: Path, shapes: Shapes, base: Path) -> dict[str, Any]:
    """The scheduler's config for a checkpoint; {} if the base has none."""
    place = base / "scheduler" / "scheduler_config.json"
    if not place.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        return own_scheduler(shapes, metadata, read_config(place))
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {str(path)!r}: {error}") from error


def _has(shapes: Shapes, *starts: str) -> bool:
    return any(name.startswith(starts) for name in shapes)


def _kind_of(tensors: Shapes) -> str | None:
    """What people call a checkpoint with these tensors in its network: a key of a family's `single_files`."""
    kinds = (kind for family in FAMILIES.values() for kind in family.single_files.items())
    return next((name for name, recognised in kinds if recognised(tensors)), None)


def _kind(path: Path, shapes: Shapes) -> str | None:
    """What people call the checkpoint; None for a network under the names of diffusers."""
    if any(part in name for name in shapes for part in _LORA_KEYS):
        raise CheckpointError(
            f"checkpoint {str(path)!r}: is a LoRA, not a whole model; set teacher to the pipeline it belongs to and "
            "teacher_lora to this file"
        )
    kind = _kind_of({name.removeprefix(NETWORK): shape for name, shape in shapes.items()})
    if kind is not None or _has(shapes, "down_blocks.", "transformer_blocks."):
        return kind
    example = next(iter(shapes), "no tensor")
    known = [kind for family in FAMILIES.values() for kind in family.single_files]
    raise CheckpointError(
        f"checkpoint {str(path)!r}: its tensors (such as {example!r}) are of no known kind; expected "
        f"{', '.join(known)}, or a network under the names of diffusers"
    )


def _check_base(path: Path, kind: str | None, base: Path) -> None:
    if not (base / "model_index.json").is_file():
        raise CheckpointError(f"teacher_base {str(base)!r}: expected a pipeline folder with model_index.json")
    class_name = read_config(base / "model_index.json").get("_class_name")
    text = FAMILIES[_network_class(base)[1].__name__].text
    of_family = text is None or class_name in text.pipelines
    if kind is not None and not (of_family and _kind_of(_network_tensors(base, published=True)) == kind):
        raise CheckpointError(
            f"checkpoint {str(path)!r}: is {kind}, but teacher_base {str(base)!r} ({class_name}) is not; expected the "
            "pipeline that the checkpoint was trained from"
        )


def _network_class(base: Path) -> tuple[str, Any]:
    """Name and class of the base's network."""
    parts = components(base)
    for name in network_components():
        cls = getattr(diffusers, parts.get(name, ""), None)
        if isinstance(cls, type) and issubclass(cls, ModelMixin) and cls.__name__ in FAMILIES:
            return name, cls
    raise CheckpointError(
        f"teacher_base {str(base)!r}: expected a pipeline whose {' or '.join(network_components())} is one of "
        f"{', '.join(FAMILIES)}"
    )


def _network_tensors(base: Path, published: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of the base's network, under its publisher's names or under those of diffusers."""
    place, cls = _network_class(base)
    with torch.device("meta"):  # no memory for weights
        network = cls.from_config(read_config(base / place / "config.json"))
    tensors = network.state_dict()
    if published:
        layout = original_layout(cls.__name__, list(tensors), network.config)
        tensors = assemble(layout or {}, tensors)
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _check_network(path: Path, shapes: Shapes, kind: str | None, base: Path) -> None:
    """Raises CheckpointError unless the file has every tensor of the base's network, in its shape, and no other."""
    prefix = NETWORK if _has(shapes, NETWORK) else ""
    found = {
        name.removeprefix(prefix): shape
        for name, shape in shapes.items()
        if name.startswith(prefix) and name not in MARKS
    }
    expected = _network_tensors(base, published=kind is not None)
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"checkpoint {str(path)!r}: {len(wrong)} tensors of its network are not those of teacher_base's: {name!r} "
            f"is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}; set teacher_base to the pipeline "
            "that the checkpoint was trained from"
        )


def _convert(path: Path, shapes: Shapes, kind: str | None, base: Path) -> dict[str, Any]:
    """The components that the file holds."""
    place, cls = _network_class(base)
    where: dict[str, Any] = {"config": str(base), "local_files_only": True}
    whole = _has(shapes, NETWORK)
    try:
        kept: dict[str, Any] = {"subfolder": place, "torch_dtype": _dtype(path, NETWORK if whole else "")}
        if kind is None:
            made: dict[str, Any] = {place: _as_it_is(cls, path, base / place, kept["torch_dtype"])}
        else:
            made = {place: cls.from_single_file(_network_of(path, shapes), **kept, **where)}
        if _has(shapes, *_AUTOENCODER):
            kept = {"subfolder": "vae", "torch_dtype": _dtype(path, *_AUTOENCODER)}
            made["vae"] = AutoencoderKL.from_single_file(str(path), **kept, **where)
        held = {part for start, part in _TEXT_ENCODERS.items() if _has(shapes, start)}
        if kind is not None and held:
            others = {name: made.get(name) for name in components(base) if name not in held}
            dtype = _dtype(path, *_TEXT_ENCODERS)
            pipeline_class = getattr(diffusers, read_config(base / "model_index.json")["_class_name"])
            pipeline = pipeline_class.from_single_file(str(path), torch_dtype=dtype, **where, **others)
            made |= {name: getattr(pipeline, name) for name in held}
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: does not fit teacher_base {str(base)!r} "
            f"({' '.join(str(error).split())[:400]}); expected the pipeline that the checkpoint was trained from"
        ) from error
    for name, component in made.items():
        missing = [key for key, value in component.state_dict().items() if value.device.type == "meta"]
        if missing:
            raise CheckpointError(
                f"checkpoint {str(path)!r}: {len(missing)} tensors of its {name} are missing, such as {missing[0]!r}; "
                "expected a whole checkpoint, or one of the network alone"
            )
    return made


def _as_it_is(cls: Any, path: Path, folder: Path, dtype: torch.dtype) -> Any:
    """A network under the names of diffusers, which older versions of diffusers do not read from a single file."""
    network = cls.from_config(cls.load_config(folder)).to(dtype)
    network.load_state_dict({name: value for name, value in load_file(path).items() if name not in MARKS})
    return network


def _dtype(path: Path, *starts: str) -> torch.dtype:
    """A dtype that holds all tensors whose names start with one of `starts` without rounding them."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(starts) and name not in MARKS]  # noqa: SIM118
        found = {file.get_slice(name).get_dtype() for name in names}
    if found == {"F16"}:
        return torch.float16
    return torch.bfloat16 if found <= {"BF16", "F8_E4M3", "F8_E5M2"} else torch.float32


def _network_of(path: Path, shapes: Shapes) -> str | dict[str, Tensor]:
    """The file; or its tensors under the names that diffusers expects: of a UNet alone those of a whole checkpoint, and
    of FLUX.2 those of the network alone.
    """
    if "input_blocks.0.0.weight" in shapes:
        return {NETWORK + name: value for name, value in read_tensors(path).items() if name not in MARKS}
    if f"{NETWORK}single_stream_modulation.lin.weight" in shapes:
        return {name.removeprefix(NETWORK): value for name, value in read_tensors(path).items() if name not in MARKS}
    return str(path)
