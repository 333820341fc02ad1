"""Pickles of published networks, read as data: no name in the file is imported, nothing of it is called.

A pickle is a program for a small machine, and its names and calls are what makes it dangerous. This machine knows a
fixed table of names, each of which stands for a function in this file; it calls nothing else, and it sets the state of
nothing but the inert objects made here.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fdistill.base.errors import CheckpointError


@dataclass(eq=False)
class Record:
    """An object of a pickle as data: a published network, a torch module, a loss, an encoder.

    Attributes:
        name: the class, as "EDMPrecond" or "torch.nn.modules.container.ModuleDict".
        arguments, keywords: what the object was constructed from, where the pickle says so.
        state: its attributes; those of modules include _parameters, _buffers and _modules.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class _Name:
    """What a name in the file stands for; the only thing the file can call."""

    name: str
    call: Callable[..., Any]


class _Stream:
    """A file of `size` bytes, of which no reader can ask for more."""

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.left = size

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise EOFError
        self.left -= count
        return self.file.read(count)

    def readline(self) -> bytes:
        line = self.file.readline()
        self.left -= len(line)
        if not line.endswith(b"\n"):
            raise EOFError
        return line


class _Machine(pickle._Unpickler):
    """The restricted machine. The one written in Python, as its instructions can be replaced one by one."""

    stack: list[Any]
    read: Callable[[int], bytes]

    def __init__(self, stream: _Stream, size: int):
        super().__init__(stream)
        self.allowance = 2 * size  # old protocols write bytes as text and a call that encodes it

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_PYTHON_2_NAMES.get(module, module)}.{name}"
        if full.startswith("torch.nn.modules."):
            return _Name(full, lambda: Record(full))
        if _NETWORK_MODULE.fullmatch(module):
            return _Name(full, lambda: Record(name))
        if full not in _NAMES:
            raise _refused(full)
        return _NAMES[full]

    def _call(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, _Name):
            raise _refused(f"a call of a {type(function).__name__}")
        self._spend(arguments)
        self.stack[-1] = function.call(*arguments)

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record) and isinstance(state, dict):
            target.state.update(state)
        elif isinstance(target, (_DType, _Array)) and isinstance(state, tuple):
            self._spend(state)
            target.__setstate__(state)
        else:
            raise _refused(f"a state for a {type(target).__name__}")

    def _bytearray(self) -> None:
        self.stack.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def _spend(self, arguments: Iterable[Any]) -> None:
        """Limits the arguments of all calls together to twice the size of what the file holds."""
        self.allowance -= sum(
            len(value) for value in arguments if isinstance(value, (str, bytes, bytearray, list, dict))
        )
        if self.allowance < 0:
            raise CheckpointError("refused, because it builds far more than it holds; get the file from its publisher")

    def _refuse_instruction(self) -> None:
        raise _refused("a reference out of the file, or a call of an unusual kind")

    _REFUSED = ("PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "OBJ", "NEWOBJ_EX", "NEXT_BUFFER", "READONLY_BUFFER")
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        **dict.fromkeys((getattr(pickle, name)[0] for name in _REFUSED), _refuse_instruction),
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.BUILD[0]: _build,
        pickle.BYTEARRAY8[0]: _bytearray,
    }


class _StorageHeader(NamedTuple):
    dtype: torch.dtype
    numel: int


class _StorageMachine(_Machine):
    """For the pickles in front of a storage's numbers: they name the kind of storage, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module != "torch" or name not in _STORAGES:
            raise _refused(f"{module}.{name}")
        return _STORAGES[name]

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, _key, _device, numel, _view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(numel) is not int:
            raise ValueError("not a storage")
        return _StorageHeader(dtype, numel)

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **_Machine.dispatch,
        pickle.BINPERSID[0]: pickle._Unpickler.dispatch[pickle.BINPERSID[0]],
    }


#: A module of networks in somebody's own code, as training.networks: its classes are inert records, too.
_NETWORK_MODULE = re.compile(r"(\w+\.)*networks(_\w+)?")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def _storage(data: bytes) -> Tensor:
    """The numbers of `torch.save(storage, _use_new_zipfile_serialization=False)`, which is how a storage in a plain
    pickle is encoded: five pickles (magic number, version, platform, header, keys), the count, the numbers.
    """
    stream = _Stream(io.BytesIO(data), len(data))
    magic, _, _, header, _ = (_StorageMachine(stream, len(data)).load() for _ in range(5))
    if magic != _LEGACY_MAGIC or not isinstance(header, _StorageHeader):
        raise ValueError("a storage in an unknown format")
    count = int.from_bytes(stream.read(8), "little")
    if count != header.numel or count * header.dtype.itemsize != stream.left:
        raise CheckpointError(
            f"a storage of {header.numel} numbers comes with {stream.left} bytes, which does not fit; "
            "get the file from its publisher again"
        )
    if count == 0:
        return torch.empty(0, dtype=header.dtype)
    return torch.frombuffer(bytearray(stream.read(stream.left)), dtype=header.dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_options: object) -> Tensor:
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"a tensor of shape {size} and strides {stride}")
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if numel > storage.numel() or (numel and last >= storage.numel()):
        raise CheckpointError(
            f"a tensor of shape {tuple(size)} is larger than its storage of {storage.numel()} numbers; "
            "get the file from its publisher again"
        )
    return storage.as_strided(size, stride, offset) if numel else storage.new_empty(size)


def _persistent(meta: dict[str, Any]) -> Record:
    """An object of `torch_utils.persistence`; the source code that travels with it is dropped."""
    state = meta["state"]
    if not isinstance(meta["class_name"], str) or not isinstance(state, dict):
        raise ValueError("a persistent object without a class name or a state")
    arguments, keywords = state.get("_init_args"), state.get("_init_kwargs")
    return Record(
        meta["class_name"],
        arguments if isinstance(arguments, tuple) else (),
        keywords if isinstance(keywords, dict) else {},
        state,
    )


def _reconstructor(kind: _Name, _base: _Name, state: object) -> Any:
    return kind.call() if state is None else kind.call(state)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"text in encoding {encoding}")
    return text.encode("latin1")


class _DType:
    """A numpy dtype of plain numbers."""

    def __init__(self, code: str, *_options: object):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise _refused(f"numpy.dtype({code!r})")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.code = {"<": "<", ">": ">", "|": "|"}[state[1]] + self.code[-2:]

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code)


class _Array(np.ndarray[Any, Any]):
    """A numpy array of plain numbers."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, fortran, raw = state
        if type(raw) is not bytes:
            raise ValueError("an array of objects")
        restored: Any = (version, shape, dtype.numpy(), bool(fortran), raw)
        super().__setstate__(restored)


def _array(*_options: object) -> Any:
    return _Array((0,))


def _array_from_buffer(buffer: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> Any:
    return np.frombuffer(buffer, dtype.numpy()).reshape(shape, order="F" if order == "F" else "C").copy()


def _scalar(dtype: _DType, raw: bytes) -> Any:
    return np.frombuffer(raw, dtype.numpy(), count=1)[0].item()


_PYTHON_2_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_CALLS: dict[str, Callable[..., Any]] = {
    "builtins.object": object,
    "builtins.dict": dict,
    "builtins.set": set,
    "copyreg._reconstructor": _reconstructor,
    "_codecs.encode": _encode,
    "collections.OrderedDict": lambda: OrderedDict(),
    "dnnlib.util.EasyDict": dict,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "torch.storage._load_from_bytes": _storage,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "numpy.ndarray": _array,
    "numpy.dtype": _DType,
}
for _package in ("numpy.core", "numpy._core"):
    _CALLS[f"{_package}.multiarray._reconstruct"] = _array
    _CALLS[f"{_package}.multiarray.scalar"] = _scalar
    _CALLS[f"{_package}.numeric._frombuffer"] = _array_from_buffer

_NAMES: dict[str, Any] = {name: _Name(name, call) for name, call in _CALLS.items()}
_NAMES |= {str(dtype): dtype for dtype in _STORAGES.values()}


def _refused(what: str) -> CheckpointError:
    return CheckpointError(
        f"refused {what[:200]}, which no published network needs, and ran nothing; expected a pickle of EDM or EDM2: "
        "get the file from its publisher"
    )


def load_restricted(path: Path) -> Any:
    """What a pickle of a published network holds, without running any of it.

    Containers, numbers, text and numpy arrays come as they are, tensors on the CPU, every other object as a `Record`.

    Raises:
        CheckpointError: the file names anything outside a fixed list (the error says what), is truncated, no pickle,
            or cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _load(file, size, str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def loads_restricted(data: bytes, name: str) -> Any:
    """`load_restricted` of bytes, as of the pickle inside a file of torch.save; `name` is what errors call it."""
    return _load(io.BytesIO(data), len(data), name)


def _load(file: BinaryIO, size: int, name: str) -> Any:
    try:
        if size == 0:
            raise CheckpointError("is empty; download it again")
        if file.read(4) == b"PK\x03\x04":
            raise CheckpointError("is a zip archive as of torch.save; if it is a state dict, name it .pt")
        file.seek(0)
        return _Machine(_Stream(file, size), size).load()
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    except EOFError as error:
        raise CheckpointError(f"{name}: ends in the middle of a pickle; download it again") from error
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{name}: not a pickle of a published network, or a damaged one "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); download it again"
        ) from error


def state_dict(record: Record) -> OrderedDict[str, Tensor]:
    """The tensors of a module's record under the names, and in the order, of torch's own `state_dict`.

    Raises:
        CheckpointError: a part of a module is neither a tensor nor a module, or a module is part of itself or of two
            others.
    """
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    seen: set[int] = set()

    def visit(module: Any, prefix: str) -> None:
        if not isinstance(module, Record) or id(module) in seen:
            raise CheckpointError(f"module {prefix[:-1]!r}: expected a module of its own, got {type(module).__name__}")
        seen.add(id(module))
        state = module.state
        left_out = state.get("_non_persistent_buffers_set", ())
        buffers = {name: value for name, value in state.get("_buffers", {}).items() if name not in left_out}
        for name, value in (*state.get("_parameters", {}).items(), *buffers.items()):
            if not isinstance(value, (Tensor, type(None))):
                raise CheckpointError(f"{prefix}{name}: expected a tensor, got {type(value).__name__}")
            if value is not None:
                tensors[prefix + name] = value
        for name, child in state.get("_modules", {}).items():
            if child is not None:
                visit(child, f"{prefix}{name}.")

    visit(record, "")
    return tensors
