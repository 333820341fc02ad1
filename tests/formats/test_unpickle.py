from __future__ import annotations

import copyreg
import functools
import importlib
import io
import operator
import os
import pickle
import struct
import subprocess
import tracemalloc
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fdistill.base.errors import CheckpointError
from fdistill.formats.unpickle import Record, load_restricted, state_dict
from support.pickles import EasyDict, Persistent, dumps

PROTOCOLS = (0, 2, 4, 5)


def written(folder: Path, data: bytes) -> Path:
    path = folder / "network.pkl"
    path.write_bytes(data)
    return path


def read(folder: Path, data: bytes) -> Any:
    return load_restricted(written(folder, data))


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object):
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def by_name(module: str, name: str, argument: str) -> bytes:
    """A call by STACK_GLOBAL, whose name may hold dots."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


def module_with(value: object) -> nn.Module:
    module = nn.Identity()
    vars(module)["hook"] = value
    return module


def storage_bytes(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # typed storages are deprecated, and what plain pickles hold
        torch.save(tensor.storage(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


ATTACKS: dict[str, Callable[[str], Call]] = {
    "system": lambda path: Call(os.system, f"touch {path}"),
    "builtins.eval": lambda path: Call(eval, f"open({path!r}, 'w')"),
    "builtins.exec": lambda path: Call(exec, f"open({path!r}, 'w')"),
    "io.open": lambda path: Call(open, path, "w"),
    "builtins.getattr": lambda path: Call(getattr, Call(importlib.import_module, "os"), "system"),
    "importlib.import_module": lambda path: Call(importlib.import_module, "antigravity"),
    "subprocess.Popen": lambda path: Call(subprocess.Popen, ["touch", path]),
    "functools.partial": lambda path: Call(functools.partial, os.system, f"touch {path}"),
    "operator.attrgetter": lambda path: Call(operator.attrgetter, "system"),
    "copyreg.add_extension": lambda path: Call(copyreg.add_extension, "os", "system", 77),
    "torch.hub.load": lambda path: Call(torch.hub.load, "somebody/something", "network"),
    "torch.serialization.load": lambda path: Call(torch.load, path),
    "builtins.bytearray": lambda path: Call(bytearray, 2**40),
    "builtins.type": lambda path: Call(type, "Class", (), {}),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ATTACKS)
def test_calls_are_refused_by_name_wherever_they_hide(name: str, protocol: int, tmp_path: Path, marker: Path) -> None:
    call = ATTACKS[name](str(marker))
    inside_storage = Call(torch.storage._load_from_bytes, pickle.dumps(call, protocol))
    hidden = (
        call,
        {"ema": [call]},
        {"ema": Persistent("EDMPrecond", marker, {"_parameters": {"weight": call}})},
        nn.ModuleDict({"inner": module_with(call)}),
        {"ema": inside_storage},
        OrderedDict(hook=EasyDict(call=call)),
    )
    for content in hidden:
        with pytest.raises(CheckpointError, match=rf"refused [\w.]*{name.split('.')[-1]}"):
            read(tmp_path, dumps(content, protocol))
    assert not marker.exists()


def test_the_attacks_are_real(tmp_path: Path, marker: Path) -> None:
    for data in (
        pickle.dumps(ATTACKS["system"](str(marker))),
        pickle.dumps(ATTACKS["builtins.eval"](str(marker)), 0),
        by_name("torch", "serialization.os.system", f"touch {marker}"),
        f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode(),
        f"(S'touch {marker}'\nios\nsystem\n.".encode(),
    ):
        pickle.loads(data)
        assert marker.exists()
        marker.unlink()


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"cposix\nsystem\n(S'touch %s'\ntR.", "posix.system"),
        (b"c__builtin__\neval\n(S'open(%s)'\ntR.", "builtins.eval"),
        (b"(S'touch %s'\nios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\nS'touch %s'\no.", "os.system"),
        (b"S'touch %s'\n\x82\x01.", "out of the file"),
        (b"Punknown\n.", "out of the file"),
        (b"\x80\x02U\x07unknownQ.", "out of the file"),
        (b"\x80\x02ccollections\nOrderedDict\n)}\x92.", "call of an unusual kind"),
        (b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.", "a state for a _Name"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__K\x01sb.", "a state for a _Name"),
        (b"\x80\x02c__builtin__\ndict\n)R}X\x0b\x00\x00\x00__setitem__K\x01sb.", "a state for a dict"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "a call of a str"),
        (b"\x80\x02X\x01\x00\x00\x00a)\x81.", "a call of a str"),
        (by_name("torch", "serialization.os.system", "touch"), r"torch\.serialization\.os\.system"),
        (by_name("torch.nn", "modules.os.system", "touch"), "not a pickle of a published network"),
        (
            by_name("torch.storage", "_load_from_bytes.__globals__", "touch"),
            r"torch\.storage\._load_from_bytes\.__glob",
        ),
        (by_name("builtins", "dict.__class__", "touch"), r"builtins\.dict\.__class__"),
    ],
)
def test_hand_written_machine_code_is_refused(data: bytes, named: str, tmp_path: Path, marker: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        read(tmp_path, data.replace(b"%s", str(marker).encode()))
    assert not marker.exists()
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)


def test_extensions_registered_in_this_process_are_refused(tmp_path: Path, marker: Path) -> None:
    copyreg.add_extension("posix", "system", 240)
    try:
        data = b"\x80\x02\x82\xf0X" + struct.pack("<I", len(f"touch {marker}")) + f"touch {marker}".encode() + b"\x85R."
        assert pickle.loads(data) == 0  # which caches the function, past find_class
        marker.unlink()
        with pytest.raises(CheckpointError, match="refused"):
            read(tmp_path, data)
        assert not marker.exists()
    finally:
        copyreg.remove_extension("posix", "system", 240)


def test_states_and_reductions_of_stand_ins_do_nothing(tmp_path: Path, marker: Path) -> None:
    state = {"__setstate__": 1, "__class__": 2, "__reduce__": 3, "state": 4, "__dict__": {"name": "other"}}
    module = nn.Identity()
    vars(module).update(state)
    record = read(tmp_path, dumps({"ema": Persistent("Precond", marker, dict(state)), "module": module}))
    assert record["ema"].name == "Precond"
    assert record["module"].name == "torch.nn.modules.linear.Identity"
    assert type(record["module"]) is type(record["ema"]) is Record
    assert record["module"].state.items() >= state.items()
    assert not marker.exists()


def module_of_everything() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), nn.ModuleDict({"b": nn.BatchNorm2d(3), "a": nn.Linear(2, 2)}), nn.Identity()
    )
    network[2].register_buffer("left_out", torch.ones(2), persistent=False)
    network[2].register_buffer("nothing", None)
    network[2].register_parameter("neither", None)
    network[2].register_buffer("strided", torch.randn(3, 5).half().T[1:, ::2])
    network[2].register_buffer("brain", torch.randn(3).bfloat16())
    network[2].register_buffer("bits", torch.tensor([True, False]))
    network[2].register_buffer("scalar", torch.tensor(3.5, dtype=torch.float64))
    network[2].register_buffer("empty", torch.empty(0, 4))
    return network


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_and_their_names_are_torchs_own(protocol: int, tmp_path: Path) -> None:
    network = module_of_everything()
    expected = network.state_dict()
    record = read(tmp_path, pickle.dumps(network, protocol))
    found = state_dict(record)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value)
    assert record.state["_modules"]["0"].state["kernel_size"] == (3, 3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_come_as_they_are(protocol: int, tmp_path: Path, marker: Path) -> None:
    plain = {
        "numbers": [1, 2.5, -(2**70), True, None, float("inf"), {1, 2}, (3, "ü")],
        "torch": [torch.float16, torch.device("cuda", 1), torch.Size([2, 3])],
        "text": b"\x00\xff",
        "numpy": [np.float32(1.5), np.int64(7), np.float64(2.5)],
    }
    arrays = {"c": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3))}
    arrays["swapped"] = np.arange(3, dtype=">f4")
    content = EasyDict(plain | {"arrays": arrays, "loss": Persistent("EDMLoss", marker, {"P": 1}, 1, std=0.5)})
    found = read(tmp_path, dumps(content, protocol))
    for name, array in arrays.items():
        assert np.array_equal(found["arrays"][name], array)
    assert {name: found[name] for name in plain} == plain
    loss = found["loss"]
    assert (loss.name, loss.arguments, loss.keywords, loss.state["P"]) == ("EDMLoss", (1,), {"std": 0.5}, 1)
    assert "open(" not in repr(vars(loss))
    assert not marker.exists()


def test_source_text_would_run_in_a_plain_unpickler(tmp_path: Path, marker: Path) -> None:
    from support.pickles import published_names

    data = dumps(Persistent("EDMPrecond", marker, {}))
    with published_names():
        pickle.loads(data)
    assert marker.exists()


def test_arrays_of_objects_are_refused(tmp_path: Path, marker: Path) -> None:
    for protocol in PROTOCOLS:
        with pytest.raises(CheckpointError, match=r"refused .*(O8|system)"):
            read(tmp_path, pickle.dumps(np.array([ATTACKS["system"](str(marker))], dtype=object), protocol))
    with pytest.raises(CheckpointError, match=r"refused numpy\.dtype\('V8'\)"):
        read(tmp_path, pickle.dumps(np.zeros(2, dtype=[("a", "i4"), ("b", "f4")])))
    assert not marker.exists()


class Tensor:
    """Pickled as a call that rebuilds a tensor."""

    def __init__(self, data: bytes, *geometry: object):
        self.data, self.geometry = data, geometry

    def __reduce__(self) -> tuple[Any, ...]:
        storage = Call(torch.storage._load_from_bytes, self.data)
        return torch._utils._rebuild_tensor_v2, (storage, *self.geometry, False, OrderedDict())


def test_tensors_have_to_fit_into_their_storage(tmp_path: Path) -> None:
    data = storage_bytes(torch.arange(6.0))
    found = read(tmp_path, pickle.dumps(Tensor(data, 1, (2, 2), (3, 1))))
    assert found.tolist() == [[1.0, 2.0], [4.0, 5.0]]
    for geometry in (
        (0, (2**20, 2**20), (0, 0)),  # one number, repeated
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (2, 3), (4, 1)),
        (6, (1,), (1,)),
    ):
        with pytest.raises(CheckpointError, match=r"larger than its storage of 6 numbers"):
            read(tmp_path, pickle.dumps(Tensor(data, *geometry)))
    for geometry in ((0, (2,), (-1,)), (-1, (2,), (1,)), (0, (2,), (1, 1)), (0, (2.0,), (1,)), (0, (-2, -2), (1, 1))):
        with pytest.raises(CheckpointError, match="a tensor of shape"):
            read(tmp_path, pickle.dumps(Tensor(data, *geometry)))


def test_storages_have_to_hold_what_they_say(tmp_path: Path) -> None:
    data = storage_bytes(torch.arange(6.0))
    other_count = data.replace(struct.pack("<q", 6), struct.pack("<q", 2**40))
    other_header = data.replace(b"K\x06N", b"K\x05N")
    assert len({data, other_count, other_header}) == 3
    for changed in (data[:-4], data + b"\0\0\0\0", other_count, other_header):
        with pytest.raises(CheckpointError, match=r"storage of \d numbers comes with \d+ bytes"):
            read(tmp_path, pickle.dumps(Tensor(changed, 0, (2,), (1,))))
    with pytest.raises(CheckpointError, match="ends in the middle"):
        read(tmp_path, pickle.dumps(Tensor(data[:100], 0, (2,), (1,))))
    with pytest.raises(CheckpointError, match="unknown format"):
        read(tmp_path, pickle.dumps(Tensor(data.replace(data[4:12], b"12345678"), 0, (2,), (1,))))
    zipped = io.BytesIO()
    torch.save(torch.zeros(2), zipped)
    with pytest.raises(CheckpointError, match="refused"):
        read(tmp_path, pickle.dumps(Tensor(zipped.getvalue(), 0, (2,), (1,))))
    with pytest.raises(CheckpointError, match="zip archive"):
        read(tmp_path, zipped.getvalue())


BOMBS = {
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**28) + b"x.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**28) + b"x.",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**28) + b"x.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**28) + b"x.",
    "memo": b"\x80\x02]r\xff\xff\xff\xff0.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_takes_little_memory(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            load_restricted(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_what_is_built_of_one_thing_many_times_is_refused(tmp_path: Path) -> None:
    data = storage_bytes(torch.zeros(1000))
    calls = [Call(torch.storage._load_from_bytes, data) for _ in range(50)]
    shared = pickle.dumps(calls, 4)
    assert len(shared) < 2 * len(data)
    with pytest.raises(CheckpointError, match="far more than it holds"):
        read(tmp_path, shared)


def test_files_that_are_no_pickle_say_so(tmp_path: Path) -> None:
    whole = pickle.dumps(module_of_everything(), 4)
    for length in range(1, len(whole), 97):
        with pytest.raises(CheckpointError, match=r"(ends in the middle|not a pickle|damaged)"):
            read(tmp_path, whole[:length])
    with pytest.raises(CheckpointError, match=r"network\.pkl: is empty"):
        read(tmp_path, b"")
    for data in (b"<html>404</html>", b"hello\n", b"\x00" * 64, b"."):
        with pytest.raises(CheckpointError, match="not a pickle of a published network"):
            read(tmp_path, data)
    for path in (tmp_path / "nowhere.pkl", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_restricted(path)


def test_noise_never_gets_past_the_error(tmp_path: Path) -> None:
    """Single bytes changed at random: either the file is read, or the error is ours."""
    whole = bytearray(pickle.dumps(nn.Linear(2, 2), 4))
    generator = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(whole)
        changed[generator.integers(len(whole))] = generator.integers(256)
        with suppress(CheckpointError):
            read(tmp_path, bytes(changed))


def test_modules_are_their_own(tmp_path: Path) -> None:
    loop = Record("A")
    loop.state["_modules"] = {"inner": loop}
    with pytest.raises(CheckpointError, match="'inner'"):
        state_dict(loop)
    layer = Record("Linear", state={"_parameters": {"weight": torch.ones(1)}})
    with pytest.raises(CheckpointError, match="'b'"):
        state_dict(Record("A", state={"_modules": {"a": layer, "b": layer}}))
    with pytest.raises(CheckpointError, match="a: expected a tensor, got str"):
        state_dict(Record("A", state={"_parameters": {"a": "text"}}))
    with pytest.raises(CheckpointError, match="got dict"):
        state_dict(Record("A", state={"_modules": {"a": {}}}))
