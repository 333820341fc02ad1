from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fdistill.base.errors import CheckpointError, OutputError
from fdistill.base.files import (
    atomic_file,
    atomic_folder,
    cached_folder,
    check_file,
    claimed_folder,
    made_once,
    nothing_cached,
    replaced_folder,
    sha256_of_files,
    weights_sha256,
)
from fdistill.base.state_dicts import load_exactly, take
from fdistill.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    optimizer_tensors,
    own_chunks,
    prepare_optimizer,
    save_checkpoint,
)


def fails_half_way(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        fails_half_way(temporary)
    assert path.read_text() == "old"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_hashes_of_files_are_of_their_contents_in_order(tmp_path: Path) -> None:
    """FIPS 180-2's example, "abc", cut into files; stored hashes rest on these values."""
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    for name, content in {
        "1.safetensors": b"a",
        "b/2.safetensors": b"b",
        "b/3.safetensors": b"c",
        "d.json": b"d",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert weights_sha256(tmp_path) == expected
    parts = [tmp_path / name for name in ("1.safetensors", "b/2.safetensors", "b/3.safetensors")]
    assert sha256_of_files(parts) == expected
    assert sha256_of_files(parts[::-1]) != expected


def test_a_cached_folder_is_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))
    made = []

    def fill(folder: Path) -> None:
        made.append(folder)
        (folder / "a.txt").write_text("whole")

    with pytest.raises(RuntimeError):
        made_once("kind", {"a": 1}, lambda folder: fails_half_way(folder / "a.txt"))
    assert list((tmp_path / "cache" / "kind").iterdir()) == []
    first = made_once("kind", {"a": 1, "b": 2}, fill)
    assert made_once("kind", {"b": 2, "a": 1}, fill) == first == cached_folder("kind", {"a": 1, "b": 2})
    assert len(made) == 1
    assert made_once("kind", {"a": 2}, fill) != first
    assert [path.name for path in first.iterdir()] == ["a.txt"]


def test_two_runs_may_make_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))

    def fill(folder: Path) -> None:
        (folder / "a.txt").write_text("second")
        other = cached_folder("kind", {})
        other.mkdir()
        (other / "a.txt").write_text("first")

    assert (made_once("kind", {}, fill) / "a.txt").read_text() == "first"
    assert len(list((tmp_path / "cache" / "kind").iterdir())) == 1


def test_the_cache_is_read_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDISTILL_CACHE", str(tmp_path / "cache"))
    kept = made_once("kind", {"a": 1}, lambda folder: (folder / "a.txt").touch())
    with nothing_cached():
        assert made_once("kind", {"a": 1}, lambda folder: pytest.fail("made again")) == kept
        with nothing_cached():
            made = made_once("kind", {"a": 2}, lambda folder: (folder / "a.txt").touch())
        assert (made / "a.txt").is_file()
        assert made_once("kind", {"a": 2}, lambda folder: pytest.fail("made again")) == made
    assert not made.exists()
    assert list((tmp_path / "cache" / "kind").iterdir()) == [kept]


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("first", "second"):
        with replaced_folder(path) as temporary:
            (temporary / name).write_text(name)
    assert [p.name for p in path.iterdir()] == ["second"]
    with pytest.raises(RuntimeError), replaced_folder(path) as temporary:
        fails_half_way(temporary / "third")
    assert [p.name for p in path.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_the_old_folder_survives_a_rename_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "first").write_text("")
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OutputError, match="Input/output error"), replaced_folder(path) as temporary:
        (temporary / "second").write_text("")
    monkeypatch.undo()
    assert [p.name for p in path.iterdir()] == ["first"]
    # Killed between the two renames: the next call puts the old folder back first.
    path.replace(tmp_path / ".folder.old")
    with pytest.raises(RuntimeError), replaced_folder(path) as temporary:
        fails_half_way(temporary / "third")
    assert [p.name for p in path.iterdir()] == ["first"]


def test_claimed_folders_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with claimed_folder(tmp_path / "link") as folder:
        assert folder == tmp_path / "empty"
        assert not folder.exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="current folder"), claimed_folder(Path()):
        pass
    for path in (Path(), Path("/")):
        with pytest.raises(OutputError, match="is a folder"):
            check_file(path)


def test_unwritable_paths_are_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), atomic_file(tmp_path / "file" / "below.txt"):
        pass
    with pytest.raises(OutputError, match="cannot write"), atomic_folder(tmp_path / "file" / "below"):
        pass


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from fdistill.training.checkpoint import checkpoints, own_chunks, save_checkpoint
from fdistill.base.errors import OutputError
folder = Path(sys.argv[1])
save_checkpoint(folder, 1, own_chunks({"w": torch.zeros(10)}), {}, keep=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # the kernel refuses larger files
try:
    save_checkpoint(folder, 2, own_chunks({"w": torch.zeros(1_000_000)}), {}, keep=2)
except OutputError as error:
    print("refused:", error)
print([path.name for path in checkpoints(folder)], sorted(path.name for path in folder.iterdir()))
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs file size limits")
def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "checkpoints")], capture_output=True, text=True, check=False
    )
    assert "refused: cannot write" in done.stdout, done.stdout + done.stderr
    assert "['000001'] ['000001']" in done.stdout


def test_checkpoints_come_back_and_old_ones_go(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(3), "b": torch.tensor(2.5)}
    for iteration in (5, 10, 1_000_000):
        save_checkpoint(tmp_path, iteration, own_chunks(tensors), {"x": 1}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["000010", "1000000"]
    loaded, meta = load_checkpoint(checkpoints(tmp_path)[-1])
    assert meta == {"iteration": 1_000_000, "x": 1}
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert take(loaded, "a").keys() == {"weight"}


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    for iteration in (1, 2, 3, 4):
        save_checkpoint(tmp_path, iteration, own_chunks({"a": torch.zeros(1)}), {}, keep=1, spared={min(iteration, 2)})
    assert [path.name for path in checkpoints(tmp_path)] == ["000002", "000004"]


def test_truncated_checkpoints_are_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, own_chunks({"w": torch.randn(100)}), {}, keep=1)
    whole = (path / "state.safetensors").read_bytes()
    (path / "state.safetensors").write_bytes(whole[:-20])
    with pytest.raises(CheckpointError, match="cannot be used"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="do not fit"):
        load_exactly(nn.Linear(2, 2), {"weight": torch.zeros(3, 3), "bias": torch.zeros(2)}, "role")


def test_optimizer_state_is_bit_identical_after_a_round_trip() -> None:
    def run(steps: int, restart_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        module = nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        for step in range(steps):
            if step == restart_at:
                saved = {name: value.clone() for name, value in optimizer_tensors(optimizer).items()}
                optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
                prepare_optimizer(optimizer, [f"optimizer.{name}" for name in saved], "optimizer")
                for name, value in optimizer_tensors(optimizer).items():
                    value.copy_(saved[name])
            optimizer.zero_grad()
            module(torch.full((2, 4), float(step))).square().sum().backward()
            optimizer.step()
        return module.weight.detach()

    assert torch.equal(run(6, None), run(6, 3))
