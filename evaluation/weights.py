"""Weights of published feature networks: from files that the user gives, from caches, or downloaded."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch

from fdistill.base.distributed import everywhere, first_process_of_machine_first
from fdistill.base.errors import ArgumentError, CheckpointError, brief, did_you_mean
from fdistill.base.reading import not_here
from fdistill.preference.models import MODELS

__all__ = ["parse_weights"]

#: Weights that the user gave, {network: file or folder}; "" is a folder of files, or a file, under published names.
Weights = Mapping[str, Path]

_TIMEOUT = 5  # seconds to wait for a server's first answer


class MissingWeightsError(CheckpointError):
    """Weights of a published network are nowhere, and cannot be downloaded."""


@dataclass(frozen=True)
class PublishedFile:
    """A weights file as its authors published it.

    Attributes:
        name: its path inside a folder of weights and inside the torch hub cache.
        url: where it is downloaded from.
        sha256: its hash, or as many of the first digits as are known.
        repository: its Hugging Face repository, if it has one; it is then looked for in that cache too.
    """

    name: str
    url: str
    sha256: str
    repository: str = ""


def _in_repository(repository: str, sha256: str, file: str = "open_clip_model.safetensors") -> PublishedFile:
    name = f"{repository.split('/')[1]}/{file}"
    return PublishedFile(name, f"https://huggingface.co/{repository}/resolve/main/{file}", sha256, repository)


_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"

PUBLISHED: dict[str, PublishedFile] = {
    "inception": PublishedFile(
        "weights-inception-2015-12-05-6726825d.pth",
        _FIDELITY + "weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "dinov2": PublishedFile(
        "dinov2_vitl14_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    ),
    "vgg16": PublishedFile(
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "lpips": PublishedFile(
        "weights-vgg16-lpips.pth",
        _FIDELITY + "weights-vgg16-lpips.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    ),
    "clip-b32": _in_repository(
        "timm/vit_base_patch32_clip_224.openai", "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31"
    ),
    "clip-l14": _in_repository(
        "timm/vit_large_patch14_clip_224.openai", "9ce2e8a8ebfff3793d7d375ad6d3c35cb9aebf3de7ace0fc7308accab7cd207e"
    ),
    "clip-g14": _in_repository("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", ""),
    **{name: _in_repository(model.repository, "", model.file) for name, model in MODELS.items()},
    "imagereward": _in_repository("THUDM/ImageReward", "", "ImageReward.pt"),
    "bert-vocab": _in_repository(
        "google-bert/bert-base-uncased",
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        "vocab.txt",
    ),
}


def parse_weights(texts: Sequence[str]) -> dict[str, Path]:
    """Reads values of --weights, each NAME=PATH or PATH, as `Weights`.

    Raises:
        ArgumentError: an unknown name, a name given twice, or a file without NAME that has no published file name.
        CheckpointError: a path that does not exist.
    """
    networks = (*PUBLISHED, "clip")
    found: dict[str, Path] = {}
    for text in texts:
        network, separator, place = text.partition("=")
        if not separator or Path(text).expanduser().exists():
            network, place = "", text
        elif network not in networks:
            raise ArgumentError(f"weights {text!r}: unknown network {network!r}; {did_you_mean(network, networks)}")
        path = Path(place).expanduser()
        if not place or not path.exists():
            raise CheckpointError(f"weights {text!r}: no such file or folder; expected NAME=PATH or a path")
        names = [Path(file.name).name for file in PUBLISHED.values()]
        if not network and path.is_file() and path.name not in names:
            raise ArgumentError(
                f"weights {text!r}: a file without its published name, so it is unclear which network it is for; pass "
                f"NAME=PATH with one of {', '.join(networks)}"
            )
        if network in found:
            what = f"{network!r} is given twice" if network else "a second path without a name"
            raise ArgumentError(f"weights {text!r}: {what}; pass each network once, as NAME=PATH")
        found[network] = path
    return found


def find_weights(network: str, file: PublishedFile, given: Weights) -> Path:
    """The weights file of a network.

    It is given[network], else the file of that name in given[""], in the torch hub cache or in the Hugging Face cache,
    else a download into one of these caches. All processes must call this together; the first one of each machine
    downloads.

    Raises:
        CheckpointError: given[network] is no file.
        MissingWeightsError: a process finds no file anywhere. Without a connection, or with HF_HUB_OFFLINE set, this is
            raised at once.
    """
    if network in given:
        place = given[network]
        place = place / Path(file.name).name if place.is_dir() else place
        if not place.is_file():
            raise CheckpointError(
                f"weights {network}={given[network]}: {not_here(place)}; take {file.name} from {file.url}"
            )
        return place
    problem = ""
    with first_process_of_machine_first():  # an error raised in here would leave the other processes waiting
        path = _in_given(file, given) or _in_caches(file)
        if path is None:
            problem = _download(file)
            path = _in_caches(file)
    # All processes must go on to the same networks, and only some of their machines may have the file.
    if not everywhere(path is not None) or path is None:
        why = problem or "on another machine of this run"
        raise MissingWeightsError(
            f"{network}: its weights {Path(file.name).name} are not here and cannot be downloaded ({why}); fetch "
            f"{file.url} on another machine and put it at {_hub_path(file)}, or pass --weights {network}=PATH"
        )
    return path


def _in_given(file: PublishedFile, given: Weights) -> Path | None:
    place = given.get("")
    if place is None:
        return None
    if place.is_dir():
        return place / file.name if (place / file.name).is_file() else None
    # The full path is compared: files of all repositories have the same file name.
    return place if place.name == file.name else None


def _hub_path(file: PublishedFile) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / file.name


def _in_caches(file: PublishedFile) -> Path | None:
    path = _hub_path(file)
    if path.is_file():
        return path
    if file.repository:
        cached = huggingface_hub.try_to_load_from_cache(file.repository, Path(file.name).name)
        if isinstance(cached, str):
            return Path(cached)
    return None


def _download(file: PublishedFile) -> str:
    """Downloads into a cache. Returns what went wrong; empty if nothing did."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    try:
        # Without a connection the downloads below would wait for minutes or retry again and again.
        urllib.request.urlopen(file.url, timeout=_TIMEOUT).close()
        if file.repository:
            huggingface_hub.hf_hub_download(file.repository, Path(file.name).name)
        else:
            path = _hub_path(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(file.url, str(path), hash_prefix=file.sha256)
    except Exception as error:  # of any of three libraries: the next process must get its turn in any case
        return brief(error)
    return ""


def is_published(path: Path, sha256: str, file: PublishedFile) -> bool:
    """Whether the file at `path` with this hash is the published one.

    If no published hash is known, a file in the Hugging Face cache counts as published if its hash is the one under
    which the hub stores it in that repository.
    """
    if file.sha256:
        return sha256.startswith(file.sha256)
    blob = path.resolve()
    folder = f"models--{file.repository.replace('/', '--')}"
    return bool(file.repository) and blob.name == sha256 and folder in blob.parts
