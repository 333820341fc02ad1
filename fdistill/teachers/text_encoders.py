"""The text encoders of a text-to-image teacher, which turn prompts into the condition of its denoiser."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import diffusers
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from fdistill.adapters import runs_prompts, supported_pipelines
from fdistill.adapters.checkpoint import Checkpoint, check_configs, find_network
from fdistill.adapters.config_fields import check_fields
from fdistill.adapters.encoder_fields import TEXT_ENCODER_FIELDS
from fdistill.adapters.family import TextToImage
from fdistill.adapters.pretrained import LOADING_ERRORS, check_size
from fdistill.base.distributed import gather_rows
from fdistill.base.errors import CheckpointError, did_you_mean
from fdistill.base.files import read_json_object, sampled_sha256
from fdistill.base.rng import world
from fdistill.condition import TextCondition

_BATCH = 32  # prompts that the encoders process at once
_SHOWN = 256  # prompts between two updates of progress


@dataclass(frozen=True)
class CutPrompt:
    """A prompt that is longer than a tokenizer's limit, so that its end is dropped.

    Attributes:
        index: the prompt's position in the list.
        tokenizer: name of the tokenizer in the pipeline.
        tokens: length of the prompt, in tokens.
        limit: number of tokens that the encoder takes.
        dropped: the text that is cut off.
    """

    index: int
    tokenizer: str
    tokens: int
    limit: int
    dropped: str


class PromptEncoder:
    """Frozen text encoders with their tokenizers, as the teacher's own pipeline uses them.

    They stay on the CPU and are moved to a device only inside `on`, so that they take no memory from training.

    Args:
        family: how the pipeline's family of networks encodes prompts.
        pipeline: the pipeline without denoiser and autoencoder.
        resolution: height and width in pixels of the images to be generated, which is part of the condition of some
            networks.
    """

    def __init__(self, family: TextToImage, pipeline: DiffusionPipeline, resolution: int):
        self._family, self._pipeline, self._resolution = family, pipeline, resolution

    @property
    def components(self) -> dict[str, Any]:
        """The pipeline's encoders and tokenizers, by component name."""
        return dict(self._pipeline.components)

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[None]:
        """Moves the encoders to the device for the duration of the block."""
        try:
            self._pipeline.to(device)
            yield
        finally:
            self._pipeline.to("cpu")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """Encodes at least one prompt, on the device that the encoders are on.

        Prompts that are too long are cut; `cut` lists them.
        """
        with quiet(), self._explained():
            parts = [
                self._family.encode_prompts(self._pipeline, list(prompts[first : first + _BATCH]), self._resolution)
                for first in range(0, len(prompts), _BATCH)
            ]
        return TextCondition.concat(parts)

    @torch.no_grad()
    def null(self, negative_prompt: str = "") -> TextCondition:
        """The negative condition of guidance, one row: the negative prompt, or the family's own empty prompt."""
        with quiet(), self._explained():
            return self._family.encode_null(self._pipeline, negative_prompt, self._resolution)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what encoders raise for tokens that they do not know into an error that names the folder."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except LOADING_ERRORS as error:
            raise CheckpointError(
                f"{self._pipeline.config.get('_name_or_path')}: its text encoders cannot read prompts "
                f"({' '.join(str(error).split())[:400]}); expected tokenizer and text_encoder folders that belong "
                "together, so copy both from the published pipeline"
            ) from error

    def cut(self, prompts: Sequence[str]) -> list[CutPrompt]:
        """Lists the prompts that are longer than a tokenizer's limit, with the text that is dropped."""
        found = []
        called = inspect.signature(type(self._pipeline).__call__).parameters.get("max_sequence_length")
        # Tokens that the pipeline reads. CLIP's tokenizers have lower limits; PixArt-alpha and Sigma differ only here.
        read = sys.maxsize if called is None else int(called.default)
        for name, limit in self._family.tokenizers.items():
            tokenizer: Any = getattr(self._pipeline, name, None)
            if tokenizer is None:
                continue
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor of prompts and images holds one
            before = self._family.tokens_before(self._pipeline)
            most = min(limit or tokenizer.model_max_length, read) - before
            call = {"truncation": False, "verbose": False, "add_special_tokens": not before}
            for index, ids in enumerate(tokenizer(list(prompts), **call).input_ids):
                if len(ids) > most:
                    ends = len(ids) - most + (0 if before else _closing(tokenizer))
                    dropped = tokenizer.decode(ids[-ends:], skip_special_tokens=True)
                    found.append(CutPrompt(index, name, len(ids), most, dropped.strip()))
        return found


def _closing(tokenizer: Any) -> int:
    """Number of end tokens, which stay when a prompt is cut: 1 for CLIP and T5, 0 for Gemma and Qwen."""
    ids = tokenizer("a").input_ids
    return int(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)


def describe_cut(cut: Sequence[CutPrompt], prompts: Sequence[str]) -> str:
    """A message to the user about prompts that were cut; empty if there are none."""
    if not cut:
        return ""
    by_tokenizer = {name: [entry for entry in cut if entry.tokenizer == name] for name in {e.tokenizer for e in cut}}
    sentences = []
    for name, entries in sorted(by_tokenizer.items()):
        first = entries[0]
        sentences.append(
            f"{len(entries)} of {len(prompts)} prompts are longer than the {first.limit} tokens that {name} takes, and "
            f"are cut; prompt {first.index} ({first.tokens} tokens) loses {first.dropped!r}"
        )
    return "; ".join(sentences)


class EncodesPrompts(Protocol):
    """What a source of images needs: a `PromptEncoder`, or an object that returns prompts encoded before."""

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """A block inside which `encode` may be called."""

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """Encodes at least one prompt."""

    def cut(self, prompts: Sequence[str]) -> list[CutPrompt]:
        """Lists the prompts that are too long."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silences diffusers and transformers: their warnings, such as one for each cut prompt, and progress bars."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def text_components(checkpoint: Checkpoint) -> dict[str, Any]:
    """Text encoders and tokenizers of a pipeline folder, by name; empty for a network that takes no prompts."""
    entries = [entry for name, entry in checkpoint.index.items() if name.startswith("text_encoder")]
    if all(entry[0] is None for entry in entries):
        return {}
    components = open_prompt_encoder(checkpoint, 0).components
    return {name: part for name, part in components.items() if name.startswith(("text_encoder", "tokenizer"))}


def open_prompt_encoder(checkpoint: Checkpoint, resolution: int, precision: str = "fp32") -> PromptEncoder:
    """Loads the text encoders in a text-to-image pipeline's folder.

    Args:
        checkpoint: the pipeline's checkpoint.
        resolution: see `PromptEncoder`.
        precision: "fp32" or "bf16", the precision of the encoders' weights and computation.

    Raises:
        CheckpointError: the checkpoint is not a pipeline folder, its pipeline class is not supported, or its files
            cannot be read.
    """
    folder = checkpoint.folder
    if folder is None:
        raise CheckpointError(f"checkpoint {checkpoint.name!r}: is a function, and functions have no text encoders")
    check_configs(folder)
    if not checkpoint.index:
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r}: {folder} has no model_index.json, so its text encoders are not known; "
            "copy the pipeline that the network was trained from, and put this network into the copy"
        )
    name = str(checkpoint.index.get("_class_name"))
    if not runs_prompts(name):
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r}: text encoders of pipeline class {name!r} are not supported; "
            f"{did_you_mean(name, supported_pipelines())}"
        )
    family, network = find_network(folder)
    if family.text is None:
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r}: its network takes no prompts; expected a text-to-image pipeline"
        )
    _check_encoders(folder, checkpoint.index)
    unused = {family.component, "vae", "safety_checker", "feature_extractor", "image_encoder"}
    absent: dict[str, Any] = {
        part: None
        for part, entry in checkpoint.index.items()
        if part in unused or (isinstance(entry, list) and entry[0] is None)
    }
    chosen = getattr(diffusers, family.text.encoding_pipeline(checkpoint.index))
    if "add_watermarker" in inspect.signature(chosen.__init__).parameters:
        absent["add_watermarker"] = False  # it needs a library of its own, and no images are made here
    _check_parts(checkpoint, absent)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        with quiet():
            pipeline = chosen.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=dtype,  # newer versions call it dtype, and accept this name with a warning
                **absent,
            )
            if absent.get("text_encoder_3", ...) is None:  # its output is replaced by zeros of the transformer's width
                settings = read_json_object(network / "config.json")
                pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**settings))
            pipeline.to(dtype)
    except LOADING_ERRORS as error:
        raise CheckpointError(
            f"{folder}: its text encoders cannot be loaded ({' '.join(str(error).split())[:400]}); expected the "
            "tokenizer and text_encoder folders of the pipeline, with safetensors"
        ) from error
    return PromptEncoder(family.text, pipeline, resolution)


def _check_parts(checkpoint: Checkpoint, absent: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a text encoder or tokenizer has no folder: some libraries make up an empty one."""
    assert checkpoint.folder is not None
    for part, entry in checkpoint.index.items():
        if part.startswith(("text_encoder", "tokenizer")) and part not in absent and isinstance(entry, list):
            if not (checkpoint.folder / part).is_dir():
                raise CheckpointError(
                    f"{checkpoint.folder}: has no folder {part}, which its model_index.json names; copy it from the "
                    "published pipeline"
                )
            check_size(checkpoint.folder / part)


def _check_encoders(folder: Path, index: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a text encoder whose config holds a field that is refused or unknown."""
    import transformers

    for part, entry in index.items():
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if name not in TEXT_ENCODER_FIELDS or not hasattr(transformers, name):
            continue
        path = folder / part / "config.json"
        try:
            config = read_json_object(path)
        except (OSError, ValueError):
            continue  # what loads it says so
        defaults = getattr(transformers, name).config_class().to_dict()
        for settings, usual in ((config, defaults), (config.get("text_config"), defaults.get("text_config"))):
            if isinstance(settings, dict):
                check_fields(f"{path}: {name}", TEXT_ENCODER_FIELDS[name], settings, usual or {})


def encoders_sha256(folder: Path) -> str:
    """A hash of the text encoders and tokenizers of a pipeline folder, by `sampled_sha256`."""
    parts = sorted(path for path in folder.glob("t*") if path.name.startswith(("text_encoder", "tokenizer")))
    return sampled_sha256((path for part in parts for path in sorted(part.rglob("*")) if path.is_file()), folder)


def encoding_facts(folder: Path, resolution: int, precision: str) -> str:
    """A hash of everything that embeddings depend on beside the prompts: encoders, image size and precision."""
    facts = [encoders_sha256(folder), resolution, precision]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def prompt_batches(
    encoders: PromptEncoder, prompts: Sequence[str], *, shared: bool = False
) -> Iterator[tuple[Sequence[str], TextCondition]]:
    """Yields prompts and their embeddings, with a progress bar; first prints which prompts are cut.

    Args:
        shared: whether all processes iterate, to the end: each encodes its part of every batch, and all have the whole
            batch. The main process shows the progress.
    """
    rank, processes = world() if shared else (0, 1)
    cut = describe_cut(encoders.cut(prompts), prompts) if rank == 0 else ""
    if cut:
        tqdm.write(cut)
    with tqdm(total=len(prompts), desc="prompts", unit="prompt", mininterval=0.5, disable=rank != 0) as bar:
        for first in range(0, len(prompts), _SHOWN):
            part = prompts[first : first + _SHOWN]
            size = -(-len(part) // processes)
            # Each process gives as many rows; the last ones may have to repeat a prompt for that.
            mine = [part[min(row, len(part) - 1)] for row in range(rank * size, (rank + 1) * size)]
            condition = encoders.encode(mine)
            if shared:
                gathered = {name: gather_rows(value) for name, value in condition.tensors.items()}
                condition = TextCondition(gathered).rows(slice(len(part)))
            yield part, condition
            bar.update(len(part))
