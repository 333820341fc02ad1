"""Checkpoints as denoisers: one file per family, and the only place that knows eps from v."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

from fdistill.adapters import unet2d
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.denoiser import Denoiser
from fdistill.errors import CheckpointError, did_you_mean
from fdistill.files import read_json_object

#: Network class in the folder's config -> the adapter that loads and exports it.
FAMILIES: dict[str, ModuleType] = {"UNet2DModel": unet2d}

_DOWNLOADED = ["*.json", "*/*.json", "*/*.safetensors"]


def resolve_checkpoint(name: str | Path) -> Path:
    """The folder behind an embedded teacher's name, a path, or a hub id (downloaded, safetensors only).

    Raises:
        CheckpointError: there is no such folder, and the hub does not have it or cannot be reached.
    """
    if str(name) in EMBEDDED_TEACHERS:
        return EMBEDDED_TEACHERS[str(name)]
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"checkpoint {str(name)!r} is a file; expected a diffusers pipeline folder")
    looks_like_path = path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1
    if looks_like_path:
        raise CheckpointError(f"checkpoint {str(name)!r}: no such folder; {did_you_mean(str(name), EMBEDDED_TEACHERS)}")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=_DOWNLOADED, etag_timeout=5))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {str(name)!r}: no such folder, and the hub gave no model of that id ({type(error).__name__}); "
            "check the id, or download the folder elsewhere and pass its path"
        ) from error


def family(folder: Path) -> ModuleType:
    """The adapter for a pipeline folder.

    Raises:
        CheckpointError: no network config where a pipeline has one, or a network class no adapter knows.
    """
    config = folder / "unet" / "config.json"
    try:
        name = str(read_json_object(config).get("_class_name"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: not a pipeline folder this version can read; expected {config.relative_to(folder)}"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config}: cannot be read ({error})") from error
    if name not in FAMILIES:
        raise CheckpointError(f"{config}: network class {name!r} is not supported; {did_you_mean(name, FAMILIES)}")
    return FAMILIES[name]


def load_teacher(path_or_hub_id: str | Path, device: torch.device | str = "cpu") -> Denoiser:
    """A teacher as a frozen denoiser in eval mode, float32.

    Args:
        path_or_hub_id: the name of an embedded teacher ("digits"), a diffusers pipeline folder, or a hub id.
        device: where to put it.

    Raises:
        CheckpointError: missing, truncated, or of an architecture that is not supported.
    """
    folder = resolve_checkpoint(path_or_hub_id)
    denoiser: Denoiser = family(folder).load(folder)
    return denoiser.eval().requires_grad_(False).to(device)
