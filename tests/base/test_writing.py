"""Two processes may write to one place, a place may be something else than a file, and writing may fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fdistill.base.errors import OutputError
from fdistill.base.files import atomic_file, atomic_folder, check_file, claimed_folder, partial_path, remove_leftovers
from fdistill.base.locks import check_free, locked

HOLDER = """
import sys, time
from pathlib import Path
from fdistill.base.files import claimed_folder, partial_path
with claimed_folder(Path(sys.argv[1])) as folder:
    partial_path(folder).mkdir()
    print("holds", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that fills tmp_path/out."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def test_an_output_that_another_process_fills_is_refused_until_it_is_dead(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    message = rf"out: process {holder.pid} on .* is writing there"
    with pytest.raises(OutputError, match=message), claimed_folder(tmp_path / "out"):
        pytest.fail("claimed twice")
    [lock] = tmp_path.glob(".*lock")
    with pytest.raises(OutputError, match=message):
        check_free(lock, "out")
    assert len(list(tmp_path.iterdir())) == 2  # the holder's lock and its temporary folder are untouched
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with claimed_folder(tmp_path / "out") as folder, atomic_folder(folder) as temporary:
        (temporary / "a").touch()
        assert len(list(tmp_path.iterdir())) == 2  # and what a dead process left is gone
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_is_for_one_block_of_a_process_too(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / ".lock"
    with locked(path, "it"), pytest.raises(OutputError, match=f"it: process {os.getpid()} "), locked(path, "it"):
        pytest.fail("locked twice")
    with locked(path, "it"):
        check_free(path, "it")  # of others
        (path.parent / "kept").touch()
    assert [found.name for found in path.parent.iterdir()] == ["kept"]
    with locked(tmp_path / "other" / ".lock", "it"):
        pass
    assert [found.name for found in tmp_path.iterdir()] == ["new"]


def test_every_writer_has_a_temporary_name_of_its_own(tmp_path: Path) -> None:
    """The one that ends last wins, and each is whole."""
    path = tmp_path / "a.txt"
    with atomic_file(path) as first:
        first.write_text("first")
        with atomic_file(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]
    assert partial_path(path) != partial_path(path)


def test_a_folder_that_has_come_to_be_there_is_not_replaced(tmp_path: Path) -> None:
    """And what took hours to make is not thrown away."""

    def fill(folder: Path) -> None:
        (folder / "ours").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()

    message = r"something else is there by now; what was made is in .*out-1"
    with pytest.raises(OutputError, match=message), atomic_folder(tmp_path / "out") as temporary:
        fill(temporary)
    assert (tmp_path / "out" / "theirs").exists()
    assert (tmp_path / "out-1" / "ours").exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_leftovers_are_those_of_one_name(tmp_path: Path) -> None:
    mine, older = partial_path(tmp_path / "a"), tmp_path / ".a.partial"
    theirs, plain = partial_path(tmp_path / "a.b"), tmp_path / ".a.txt"
    for path in (mine, older, theirs, plain):
        path.touch()
    remove_leftovers(tmp_path, "a")
    assert set(tmp_path.iterdir()) == {theirs, plain}
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {plain}


@pytest.mark.parametrize("name", ["x" * 250 + ".json", "ü" * 120 + ".json"])
def test_names_may_be_as_long_as_the_file_system_allows(tmp_path: Path, name: str) -> None:
    with atomic_file(tmp_path / name) as temporary:
        temporary.write_text("whole")
    with claimed_folder(tmp_path / name[::-1]) as folder, atomic_folder(folder):
        pass
    assert {found.name for found in tmp_path.iterdir()} == {name, name[::-1]}


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("file", "folder", "new"):
        (tmp_path / name).symlink_to(Path("disk") / name)
    (tmp_path / "disk" / "file").write_text("old")
    (tmp_path / "disk" / "file").chmod(0o640)
    for name in ("file", "new"):
        with atomic_file(tmp_path / name) as temporary:
            temporary.write_text("written")
    with claimed_folder(tmp_path / "folder") as folder, atomic_folder(folder) as temporary:
        (temporary / "a").touch()
    assert all((tmp_path / name).is_symlink() for name in ("file", "folder", "new"))
    assert (tmp_path / "disk" / "file").read_text() == (tmp_path / "disk" / "new").read_text() == "written"
    assert (tmp_path / "disk" / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "disk" / "folder" / "a").exists()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OutputError, match="leads back to itself"), atomic_file(tmp_path / "circle"):
        pass


def test_a_pipe_gets_the_bytes_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_file(pipe)
    with atomic_file(pipe) as temporary:
        temporary.write_text("through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_device_stays(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o20666, os.makedev(1, 3))
        device.write_bytes(b"")
    except OSError:
        pytest.skip("only root makes devices")
    with atomic_file(device) as temporary:
        temporary.write_text("nothing")
    assert device.is_char_device()
    os.mknod(tmp_path / "disk", 0o60666, os.makedev(240, 250))
    with pytest.raises(OutputError, match="is a device or a socket"):
        check_file(tmp_path / "disk")


def test_standard_output_is_no_name_to_replace(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom fdistill.base.files import atomic_file\nprint('before', flush=True)\n"
        "with atomic_file(Path('/dev/stdout')) as temporary:\n    temporary.write_text('scores')\n"
    )
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "before\nscores"
    assert [found.name for found in tmp_path.iterdir()] == ["log"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of file sizes")
def test_a_disk_without_room_for_tensors_is_one_message(tmp_path: Path) -> None:
    """Safetensors has an exception of its own for it."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        message = r"cannot write .*a\.safetensors: .*File too large"
        with pytest.raises(OutputError, match=message), atomic_file(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(1000)}, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
