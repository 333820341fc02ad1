"""Prompts encoded once: a text-to-image run reads these files instead of calling text encoders.

They are a folder of embeddings-00000.safetensors, ... (every tensor with a row for each prompt); prompts.jsonl (the
prompts, one object a line, a file that `read_prompts` reads as well); null.safetensors (the same tensors, [1, ...], for
the prompt that guidance leads away from); and embeddings.json, which says how they were made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdistill.base.errors import ArgumentError, DataError
from fdistill.base.files import atomic_folder, read_json_object
from fdistill.base.hashes import check_files, check_seal, noted_files, sealed
from fdistill.base.rng import world
from fdistill.condition import TextCondition
from fdistill.data.captions import json_lines
from fdistill.data.source import PerProcess

META_FILE = "embeddings.json"
META_KEYS = ("encoder", "null_prompt")

_PROMPTS, _NULL = "prompts.jsonl", "null.safetensors"
_SHARD_BYTES = 2**28
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.int32, torch.bool)
}


class Embeddings(Protocol):
    """Encoded prompts by index.

    Attributes:
        prompts: the N prompts.
        null: the encoded prompt that guidance leads away from, tensors [1, ...].
    """

    prompts: Sequence[str]
    null: TextCondition

    def __len__(self) -> int:
        """N."""

    def rows(self, index: Tensor) -> TextCondition:
        """The encoded prompts of an index int64 [B] (B >= 1, on the CPU)."""


class EmbeddingSource:
    """Encoded prompts by index, read where they are needed.

    Attributes:
        meta: the content of embeddings.json.
        prompts: the N prompts.
        null: the encoded meta["null_prompt"], tensors [1, ...].

    Args:
        folder: written by `write_embeddings`.

    Raises:
        DataError: the folder is incomplete or damaged.
    """

    def __init__(self, folder: Path):
        self.name = str(folder)
        try:
            self.meta = read_json_object(folder / META_FILE)
            stored = self.meta["tensors"].items()
            self._kinds = {name: (tuple(kind["shape"]), _DTYPES[kind["dtype"]]) for name, kind in stored}
            counts = {str(file): int(count) for file, count in self.meta["shards"].items()}
            self._per_shard = max(counts.values())
            self.null = TextCondition(load_file(folder / _NULL))
            lines = json_lines((folder / _PROMPTS).read_bytes(), f"embeddings {folder}, {_PROMPTS}")
            self.prompts: Sequence[str] = [row["prompt"] for _, row in lines]
            missing = [key for key in META_KEYS if key not in self.meta]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise DataError(f"embeddings {folder}: cannot be read ({error}); make them again") from error
        sizes = list(counts.values())
        equal = min(sizes) > 0 and all(size == self._per_shard for size in sizes[:-1])
        if missing or not equal or any(Path(file).name != file for file in counts):
            raise DataError(
                f"embeddings {folder}: {META_FILE} lacks {', '.join(missing) or 'plain names of files of equal length'}"
                "; make them again"
            )
        if len(self.prompts) != sum(sizes):
            raise DataError(f"embeddings {folder}: {len(self.prompts)} prompts for {sum(sizes)} rows; make them again")
        self._shards = [PerProcess(partial(_open, folder / file)) for file in counts]
        for file, count in {**counts, _NULL: 1}.items():
            try:
                found = _header(_open(folder / file))
            except (OSError, SafetensorError) as error:
                raise DataError(f"embeddings {folder}: {file} is damaged ({error}); make them again") from error
            expected = {name: ((count, *shape), dtype) for name, (shape, dtype) in self._kinds.items()}
            if found != expected:
                raise DataError(f"embeddings {folder}: {file} holds {found}; expected {expected}; make them again")
        try:
            rank, processes = world()
            check_seal(self.meta, META_FILE)
            check_files(folder, dict(list(self.meta.get("files", {}).items())[rank::processes]))
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"embeddings {folder}: {error}; make them again") from error

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, without the batch dimension."""
        return {name: shape for name, (shape, _) in self._kinds.items()}

    def rows(self, index: Tensor) -> TextCondition:
        """The encoded prompts of an index int64 [B] (B >= 1, on the CPU), in the dtypes in which they were written.

        Raises:
            ArgumentError: an index below 0 or beyond the last prompt.
        """
        wanted, places = index.unique(return_inverse=True)  # sorted, so files are read forwards and no row twice
        if not 0 <= int(wanted[0]) <= int(wanted[-1]) < len(self):
            raise ArgumentError(
                f"embeddings {self.name}: rows {int(wanted[0])} to {int(wanted[-1])}; expected 0 to {len(self) - 1}"
            )
        found: dict[str, list[Tensor]] = {name: [] for name in self._kinds}
        for row in wanted.tolist():
            shard, place = divmod(row, self._per_shard)
            for name, values in found.items():
                values.append(self._shards[shard].get().get_slice(name)[place])
        return TextCondition({name: torch.stack(values)[places] for name, values in found.items()})


@dataclass(frozen=True)
class Captions:
    """The prompts of a data set's rows: row i has prompt number index[i], int64 [N], of `embeddings`."""

    embeddings: Embeddings
    index: Tensor

    def rows(self, rows: Tensor) -> TextCondition:
        """The encoded prompts of these rows, int64 [B]."""
        return self.embeddings.rows(self.index[rows])

    def prompts(self, rows: Tensor) -> list[str]:
        """The prompts of these rows, int64 [B], as text."""
        return [self.embeddings.prompts[number] for number in self.index[rows].tolist()]


def write_embeddings(
    folder: Path,
    batches: Iterable[tuple[Sequence[str], TextCondition]],
    *,
    null: TextCondition,
    meta: Mapping[str, Any],
) -> None:
    """Writes a folder for `EmbeddingSource`, whole or not at all.

    Args:
        folder: to be made, or replaced.
        batches: prompts and their encoded form, on any device: float16, bfloat16 or float32, masks as integers or bool.
            A tensor must have the same shape and dtype in all batches.
        null: the encoded prompt that guidance leads away from, one row.
        meta: "encoder", a hash of the text encoders and of how they were used; "null_prompt", the text of `null`; and
            anything else that is to be noted.

    Raises:
        DataError: meta lacks a key; tensors are of several shapes or dtypes, of a dtype that is not stored, or not
            finite; or there are no prompts.
        OutputError: the folder cannot be written.
    """
    missing = [key for key in META_KEYS if key not in meta]
    if missing:
        raise DataError(f"embeddings: meta lacks {', '.join(missing)}; expected {META_KEYS}")
    kinds = _kinds(null)
    _check(["the null prompt"], null, kinds)
    row_bytes = sum(value.numel() * value.element_size() for value in null.tensors.values())
    with atomic_folder(folder) as temporary:
        shards: dict[str, int] = {}
        with (temporary / _PROMPTS).open("w", encoding="utf-8", newline="\n") as listed:
            conditions = _noted(batches, kinds, listed)
            for number, shard in enumerate(_shards(conditions, max(1, _SHARD_BYTES // row_bytes))):
                name = f"embeddings-{number:05d}.safetensors"
                save_file(dict(shard.tensors), temporary / name)
                shards[name] = len(shard)
        if not shards:
            raise DataError("embeddings: no prompts to encode; expected at least one")
        save_file(dict(TextCondition.concat([null.to("cpu")]).tensors), temporary / _NULL)
        tensors = {
            name: {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
            for name, (shape, dtype) in kinds.items()
        }
        described = {**meta, "count": sum(shards.values()), "tensors": tensors, "shards": shards}
        described = sealed({**described, "files": noted_files(temporary, [*shards, _NULL, _PROMPTS])})
        (temporary / META_FILE).write_text(json.dumps(described, indent=1), encoding="utf-8")


_Kinds = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _kinds(condition: TextCondition) -> _Kinds:
    return {name: (tuple(value.shape[1:]), value.dtype) for name, value in condition.tensors.items()}


def _check(prompts: Sequence[str], condition: TextCondition, kinds: _Kinds) -> None:
    """Raises DataError unless the tensors are those of `kinds`, one row a prompt, finite and of dtypes to be stored."""
    if _kinds(condition) != kinds or len(condition) != len(prompts):
        raise DataError(
            f"embeddings: {len(prompts)} prompts gave {len(condition)} rows of {_kinds(condition)}, the null prompt "
            f"{kinds}; expected a row each, of the same shapes and dtypes"
        )
    for name, value in condition.tensors.items():
        if value.dtype not in _DTYPES.values():
            raise DataError(f"embeddings: {name} is {value.dtype}; expected one of {', '.join(_DTYPES)}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            finite = torch.isfinite(value).reshape(len(value), -1).all(1).tolist()
            raise DataError(
                f"embeddings: {name} of {prompts[finite.index(False)]!r} is not finite; encode in bfloat16 or float32"
            )


def _noted(
    batches: Iterable[tuple[Sequence[str], TextCondition]], kinds: _Kinds, listed: Any
) -> Iterator[TextCondition]:
    """The conditions, checked, on the CPU; their prompts go into the open file `listed`."""
    for prompts, condition in batches:
        _check(prompts, condition, kinds)
        listed.writelines(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
        yield condition.to("cpu")


def _shards(conditions: Iterable[TextCondition], size: int) -> Iterator[TextCondition]:
    """Conditions joined and cut into parts of `size` rows; the last part may be smaller."""
    held: list[TextCondition] = []
    missing = size
    for condition in conditions:
        rest = condition
        while len(rest):
            held.append(rest.rows(slice(missing)))
            rest, missing = rest.rows(slice(missing, None)), missing - len(held[-1])
            if not missing:
                yield TextCondition.concat(held)
                held, missing = [], size
    if held:
        yield TextCondition.concat(held)


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _header(file: Any) -> _Kinds:
    """Shape and dtype of every tensor in a file, of which one row is read."""
    stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return {name: (tuple(values.get_shape()), values[:1].dtype) for name, values in stored.items()}
