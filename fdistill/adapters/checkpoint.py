"""Finds the checkpoint that a teacher's name refers to, and loads its denoiser."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from fdistill.adapters import (
    FAMILIES,
    OWN_COMPONENT,
    network_components,
    runs_prompts,
    set_null_class,
    supported_pipelines,
)
from fdistill.adapters.bin_weights import bins_instead, in_float32, variants_instead, with_plain_weights
from fdistill.adapters.family import Family
from fdistill.adapters.hub import hub_errors, id_and_revision, is_hub_id
from fdistill.adapters.parametrisation import read_scheduler_config
from fdistill.adapters.pretrained import load_network
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.errors import CheckpointError, FDistillError, did_you_mean
from fdistill.base.files import not_weights, read_json_object, weights_sha256
from fdistill.base.functions import import_function, raised_where
from fdistill.base.reading import reason_of
from fdistill.base.state_dicts import tensors_sha256
from fdistill.denoiser import Denoiser

_DOWNLOADED = [
    "*.json",
    "*/*.json",
    "*/*.safetensors",
    "*/*.txt",  # a tokenizer's merges
    "*/*.model",  # a tokenizer's SentencePiece model
    "*/*.jinja",  # a tokenizer's template of chats, which transformers runs in a sandbox
    "diffusion_pytorch_model.safetensors",
]
_NOT_DOWNLOADED = [
    "*.fp16.safetensors",
    "*.fp16-*",
    "*.index.fp16.json",
    "*.bf16.safetensors",
    "*.bf16-*",
    "*.non_ema.safetensors",
    "*.fp16.bin",
    "*.non_ema.bin",
    "safety_checker/*",
    "text_encoders/*",  # single files for other programs
    "vae_1_0/*",
]


#: Files with settings, of a pipeline and of its components.
_CONFIGS = ("model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json")
_UNREAD = "safety_checker"  # a component that nothing here reads


@dataclass(frozen=True)
class Checkpoint:
    """The source of a denoiser: a folder, or a function of the user's own.

    Attributes:
        name: the name as the user gave it.
        folder: the folder of a pipeline or a network.
        factory: the user's function, which returns the denoiser.
    """

    name: str
    folder: Path | None = None
    factory: Callable[[], Denoiser] | None = None

    def fingerprint(self, denoiser: Denoiser) -> str:
        """Hash of the weights and of the settings that say what they mean: schedule, prediction type, guidance."""
        meaning = f"{denoiser.null_class} {denoiser.guidance_scale}".encode()
        if self.folder is None:
            return tensors_sha256(denoiser.state_dict(), meaning)
        digest = hashlib.sha256(meaning + weights_sha256(self.folder).encode())
        for path in sorted(self.folder.rglob("*.json")):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    @property
    def index(self) -> dict[str, Any]:
        """model_index.json of a pipeline folder; empty where there is none."""
        path = (self.folder or Path()) / "model_index.json"
        try:
            return read_json_object(path) if self.folder else {}
        except (OSError, ValueError):
            return {}


def resolve_checkpoint(name: str | Path) -> Checkpoint:
    """The checkpoint of an embedded teacher's name, a path, "module:function", or a hub id, of a branch, tag or commit
    as "user/name@revision".

    A hub id is downloaded, with weights in safetensors where it has them. Weights in .bin files are read by torch's
    restricted loader, and the folder becomes a copy with safetensors, see `with_plain_weights`.

    Raises:
        CheckpointError: there is no such folder or function, and the hub does not have it or cannot be reached; or a
            .bin file holds more than tensors.
        OutputError: the cache folder cannot be written.
    """
    return _resolve(str(name), with_plain_weights, _download)


def resolve_configs(name: str | Path) -> Checkpoint:
    """As `resolve_checkpoint`, of a folder that may have no weights: of a hub id, configs alone are downloaded."""
    return _resolve(str(name), lambda folder: folder, _download_configs)


def _resolve(text: str, read: Callable[[Path], Path], download: Callable[[str], Path]) -> Checkpoint:
    if text in EMBEDDED_TEACHERS:
        return Checkpoint(text, EMBEDDED_TEACHERS[text])
    path = Path(text)
    if path.is_dir():
        return Checkpoint(text, read(path))
    if path.exists():
        what = not_weights(path)
        if what is not None:
            raise CheckpointError(f"checkpoint {text!r}: {what}")
        raise CheckpointError(
            f"checkpoint {text!r} is a file; expected a folder: `fdistill convert` makes one of a pickle, a state dict "
            "or a single-file pipeline"
        )
    module, separator, function = text.partition(":")
    if separator and module.replace(".", "").isidentifier() and function.isidentifier():
        return Checkpoint(text, factory=_factory(text))
    if not is_hub_id(text):
        raise CheckpointError(f"checkpoint {text!r}: no such folder; {did_you_mean(text, EMBEDDED_TEACHERS)}")
    return Checkpoint(text, read(download(text)))


def _factory(name: str) -> Callable[[], Denoiser]:
    try:
        factory = import_function(name)
    except Exception as error:  # a user's module may raise anything
        raise CheckpointError(
            f"checkpoint {name!r}: {type(error).__name__}: {error}; expected module:function that Python can import"
        ) from error
    if not callable(factory):
        raise CheckpointError(f"checkpoint {name!r}: is a {type(factory).__name__}; expected a function")

    def checked() -> Denoiser:
        try:
            made = factory()
        except FDistillError:
            raise
        except Exception as error:  # and so may its function
            raise CheckpointError(
                f"checkpoint {name!r}: the function raised {raised_where(error)}; expected one without arguments that "
                "returns a fdistill.Denoiser"
            ) from error
        if not isinstance(made, Denoiser):
            raise CheckpointError(
                f"checkpoint {name!r}: the function returned a {type(made).__name__}; expected a fdistill.Denoiser"
            )
        return made

    return checked


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    hub_id, revision = id_and_revision(name)

    def fetch(patterns: list[str], ignored: list[str] = _NOT_DOWNLOADED) -> Path:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=ignored, etag_timeout=5
        )
        return Path(folder)

    with hub_errors(name):
        folder = fetch(_DOWNLOADED)
        missing = bins_instead(folder)
        if missing:
            folder = fetch([*_DOWNLOADED, *missing])
        missing = variants_instead(folder)
        if missing:
            folder = fetch(missing, [pattern for pattern in _NOT_DOWNLOADED if "fp16" not in pattern])
        return folder


def _download_configs(name: str) -> Path:
    from huggingface_hub import snapshot_download

    hub_id, revision = id_and_revision(name)
    with hub_errors(name):
        wanted = ["*.json", "*/*.json"]
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted, etag_timeout=5))


def check_configs(folder: Path) -> None:
    """Checks the configs of a checkpoint folder and of its components before libraries read them. From a list or number
    these go on with defaults of other networks, or look on the hub for a checkpoint of that name.

    Raises:
        CheckpointError: one is no JSON object, or an empty one.
    """
    for path in sorted(path for name in _CONFIGS for place in ("", "*/") for path in folder.glob(place + name)):
        if path.parent.name == _UNREAD:
            continue
        try:
            if not read_json_object(path):
                raise ValueError("it is empty")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({reason_of(error)}); expected a JSON object with settings, so copy the file "
                "again from the published checkpoint"
            ) from error


def find_network(folder: Path) -> tuple[Family, Path]:
    """The family of a checkpoint folder's network, and the folder in it that holds the network.

    Raises:
        CheckpointError: the folder has no network config, or the network's class is not supported.
    """
    found = None
    places = (*network_components(), OWN_COMPONENT)
    for place in (*places, "."):
        config = folder / place / "config.json"
        try:
            settings = read_json_object(config)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{config}: cannot be read ({error})") from error
        name = str(settings.get("_class_name"))
        if name in FAMILIES:
            return FAMILIES[name], config.parent
        for family in FAMILIES.values():
            if family.earlier_config is not None and family.earlier_config(settings):
                return family, config.parent
        found = f"{config}: network class {name!r} is not supported; {did_you_mean(name, FAMILIES)}"
    raise CheckpointError(
        found
        or f"{folder}: not a checkpoint this version can read; expected config.json of the network in it, or in "
        f"{', '.join(f'{place}/' for place in places)}"
    )


def check_pipeline(checkpoint: Checkpoint, family: Family) -> None:
    """Raises CheckpointError for a text-to-image network in a pipeline class that is not supported.

    Such a pipeline may feed a network of the same class different inputs than the supported pipelines do.
    """
    name = checkpoint.index.get("_class_name")
    if family.text is not None and name is not None and not runs_prompts(name):
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r}: pipeline class {name!r} is not supported; "
            f"{did_you_mean(str(name), supported_pipelines())}"
        )


def load_denoiser(
    checkpoint: Checkpoint,
    *,
    null_class: int | None = None,
    memory_of_files: bool = False,
    load: Callable[[type[ModelMixin], Path], ModelMixin] = load_network,
) -> Denoiser:
    """Loads the denoiser of a checkpoint in eval mode, in float32, on the CPU.

    Args:
        checkpoint: the source of the denoiser.
        null_class: the label for "no class", if the checkpoint does not say it; must be its last label.
        memory_of_files: reads weights in half precision from a copy in float32, see `in_float32`, so that the weights'
            memory is a file's, whatever precision the checkpoint has.
        load: makes the network of a class from its folder.

    Raises:
        CheckpointError: the checkpoint is missing, truncated, or of an architecture that is not supported.
    """
    if checkpoint.factory is not None:
        denoiser = checkpoint.factory()
    else:
        assert checkpoint.folder is not None
        check_configs(checkpoint.folder)
        family, network = find_network(checkpoint.folder)
        check_pipeline(checkpoint, family)
        model = load(family.network, in_float32(network) if memory_of_files else network)
        try:
            denoiser = family.wrap(model, read_scheduler_config(checkpoint.folder))
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.folder}: {error}") from error
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise CheckpointError(
                f"{network / 'config.json'}: cannot be used ({error}); expected the settings of these weights"
            ) from error
    set_null_class(denoiser, null_class)
    return denoiser.eval()


def load_teacher(
    path_or_hub_id: str | Path, device: torch.device | str = "cpu", *, null_class: int | None = None
) -> Denoiser:
    """Loads a teacher as a frozen denoiser in eval mode, in float32.

    Args:
        path_or_hub_id: the name of an embedded teacher ("digits"), a checkpoint folder, a hub id, or "module:function"
            whose function returns a Denoiser.
        device: the device to put it on.
        null_class: the label for "no class", if the checkpoint does not say it; must be its last label.

    Raises:
        CheckpointError: the checkpoint is missing, truncated, or of an architecture that is not supported.
    """
    denoiser = load_denoiser(resolve_checkpoint(path_or_hub_id), null_class=null_class)
    return denoiser.requires_grad_(False).to(device)
