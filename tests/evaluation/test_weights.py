from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from evaluation.weights import (
    PUBLISHED,
    PublishedFile,
    find_weights,
    is_published,
    parse_weights,
)
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.base.files import sha256_of_files
from fdistill.base.torch_files import read_state_dict

TWO_PROCESSES = """
import os, sys
from pathlib import Path
import torch.hub
from evaluation.weights import PublishedFile, find_weights
from fdistill.base.devices import start

folder = Path(sys.argv[1])

def say(word):
    with (folder / f"{os.environ['RANK']}.txt").open("a") as file:
        file.write(word + "\\n")

def download(url, path, hash_prefix):
    say("fetches")
    fetch(url, path, hash_prefix)

fetch, torch.hub.download_url_to_file = torch.hub.download_url_to_file, download
def find(file):
    try:
        say(find_weights("net", file, {}).name)
    except Exception as error:
        say(type(error).__name__)

start("cpu")
find(PublishedFile("net.pth", (folder / "served.pth").as_uri(), ""))
find(PublishedFile("other.pth", (folder / "served.pth").as_uri(), "0123abcd"))
os.environ["HF_HUB_OFFLINE"] = "1"
torch.hub.set_dir(str(folder / os.environ["RANK"]))
find(PublishedFile("alone.pth", "", ""))
torch.distributed.destroy_process_group()
"""

FILE = PublishedFile("net-abc.pth", "https://localhost:1/net-abc.pth", "abc")


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def written(path: Path, content: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_weights_given_by_name_and_by_folder(tmp_path: Path) -> None:
    file = written(tmp_path / "a=b" / "my.pth")
    assert parse_weights([]) == {}
    assert parse_weights([f"inception={file}", str(tmp_path)]) == {"inception": file, "": tmp_path}
    assert parse_weights([str(file.parent)]) == {"": file.parent}
    named = written(tmp_path / "dinov2_vitl14_pretrain.pth")
    assert parse_weights([str(named)]) == {"": named}


def test_weights_that_name_nothing_say_so(tmp_path: Path) -> None:
    file = written(tmp_path / "my.pth")
    with pytest.raises(ArgumentError, match="did you mean 'inception'"):
        parse_weights([f"incpetion={file}"])
    with pytest.raises(CheckpointError, match="no such file"):
        parse_weights(["inception=/nowhere/x.pth"])
    with pytest.raises(CheckpointError, match="no such file"):
        parse_weights(["inception="])
    with pytest.raises(ArgumentError, match="without its published name"):
        parse_weights([str(file)])
    with pytest.raises(ArgumentError, match="'dinov2' is given twice"):
        parse_weights([f"dinov2={file}", f"dinov2={file}"])
    with pytest.raises(ArgumentError, match="second path"):
        parse_weights([str(tmp_path), str(tmp_path)])


def test_what_is_given_comes_before_what_is_cached(tmp_path: Path, torch_home: Path) -> None:
    cached = written(torch_home / FILE.name)
    other, named = written(tmp_path / "other.pth"), written(tmp_path / "folder" / FILE.name)
    assert find_weights("net", FILE, {"net": other, "": named.parent}) == other
    assert find_weights("net", FILE, {"net": named.parent}) == named
    assert find_weights("net", FILE, {"": named.parent}) == named
    assert find_weights("net", FILE, {"": named}) == named
    assert find_weights("net", FILE, {"": other}) == cached
    assert find_weights("net", FILE, {"another": other}) == cached
    with pytest.raises(CheckpointError, match="no such file"):
        find_weights("net", FILE, {"net": tmp_path / "folder" / "absent"})


def test_files_of_repositories_are_found_by_their_folder_and_in_the_hubs_cache(
    tmp_path: Path, torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = PUBLISHED["clip-l14"]
    assert file.name == "vit_large_patch14_clip_224.openai/open_clip_model.safetensors"
    # Files of this name are in every repository: a file given without its folder is none of them.
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        find_weights("clip-l14", file, {"": written(tmp_path / "open_clip_model.safetensors")})
    cache = tmp_path / "cache"
    repository = cache / "models--timm--vit_large_patch14_clip_224.openai"
    blob = written(repository / "blobs" / "123")
    snapshot = repository / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (snapshot / "open_clip_model.safetensors").symlink_to(blob)
    written(repository / "refs" / "main", "rev")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert find_weights("clip-l14", file, {}).resolve() == blob
    given = written(tmp_path / "given" / file.name)
    assert find_weights("clip-l14", file, {"": tmp_path / "given"}) == given


@pytest.mark.parametrize("network", PUBLISHED)
def test_offline_says_at_once_which_file_to_put_where(network: str, torch_home: Path) -> None:
    file = PUBLISHED[network]
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        find_weights(network, file, {})
    assert time.monotonic() - started < 2
    for part in (network, file.url, str(torch_home / file.name), f"--weights {network}=PATH", "HF_HUB_OFFLINE"):
        assert part in str(caught.value)
    assert not torch_home.exists()


@pytest.mark.parametrize("repository", ["", "nobody/nothing"])
def test_an_unreachable_server_is_noticed_within_seconds(
    repository: str, torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    file = PublishedFile(FILE.name, FILE.url, FILE.sha256, repository)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"cannot be downloaded \(.*refused"):
        find_weights("net", file, {})
    assert time.monotonic() - started < 8


def test_a_download_is_kept_and_one_with_another_hash_is_not(
    tmp_path: Path, torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    source = written(tmp_path / "served.pth", "weights")
    wrong = PublishedFile(FILE.name, source.as_uri(), "0123abcd")
    with pytest.raises(CheckpointError, match="invalid hash value"):
        find_weights("net", wrong, {})
    assert not list(torch_home.iterdir())
    right = PublishedFile(FILE.name, source.as_uri(), sha256_of_files([source])[:8])
    path = find_weights("net", right, {})
    assert path == torch_home / FILE.name
    assert path.read_text() == "weights"


@pytest.mark.thorough
def test_the_first_process_downloads_and_all_get_the_file_or_the_error(tmp_path: Path) -> None:
    """Two real processes: none may wait for one that has failed."""
    script = written(tmp_path / "script.py", TWO_PROCESSES)
    written(tmp_path / "served.pth", "weights")
    written(tmp_path / "0" / "checkpoints" / "alone.pth", "weights")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    environment = {
        "HF_HUB_OFFLINE": "0",
        "TORCH_HOME": str(tmp_path / "torch"),
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Of the second file the first process could not leave any; the third is on its machine alone.
    missing = ["fetches", "MissingWeightsError", "MissingWeightsError"]
    assert (tmp_path / "0.txt").read_text().split() == ["fetches", "net.pth", *missing]
    assert (tmp_path / "1.txt").read_text().split() == ["net.pth", *missing]


def test_state_dicts_of_all_forms_are_the_same(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(3, 2), "b": torch.arange(4)}
    save_file(state, tmp_path / "s.safetensors")
    torch.save(state, tmp_path / "zip.pth")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)  # as vgg16-397923af.pth is
    for path in tmp_path.iterdir():
        read = read_state_dict(path)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_executed(zipped: bool, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    torch.save({"a": Malicious(marker)}, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="is not executed"):
        read_state_dict(tmp_path / "bad.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(CheckpointError, match="is not executed"):
        read_state_dict(tmp_path / "bare.pth")
    assert not marker.exists()
    with pytest.raises(FileNotFoundError):  # the pickle is one that would have run
        pickle.loads(pickle.dumps(Malicious(tmp_path / "no-such-folder" / "executed")))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_is_refused_with_advice(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript archive.*open_clip_model\.safetensors"):
        read_state_dict(tmp_path / "ViT-B-32.pt")


def test_files_that_are_no_weights_say_what_they_are(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="expected tensors by name, got list"):
        read_state_dict(tmp_path / "list.pth")
    torch.save({"state_dict": {"a": torch.zeros(2)}, "epoch": 3}, tmp_path / "training.pth")
    with pytest.raises(CheckpointError, match=r"got dict for 'state_dict'"):
        read_state_dict(tmp_path / "training.pth")
    good = tmp_path / "good.pth"
    torch.save({"a": torch.zeros(1000)}, good)
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:1000])
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    (tmp_path / "empty.pth").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("notes.txt", "hello")
    for name in ("cut.pth", "cut.safetensors", "empty.pth", "other.pth", "absent.pth", "absent.safetensors"):
        with pytest.raises(CheckpointError, match=name):
            read_state_dict(tmp_path / name)


def test_only_the_published_bytes_are_published(tmp_path: Path) -> None:
    path = written(tmp_path / "file", "abc")
    sha256 = sha256_of_files([path])
    assert sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2's example
    assert is_published(path, sha256, PublishedFile("n", "u", sha256[:8]))
    assert not is_published(path, sha256, PublishedFile("n", "u", "6726825d"))
    assert not is_published(path, sha256, PublishedFile("n", "u", "", "some/repository"))
    blobs = tmp_path / "models--some--repository" / "blobs"
    assert is_published(written(blobs / sha256, "abc"), sha256, PublishedFile("n", "u", "", "some/repository"))
    assert not is_published(written(blobs / "f00", "abc"), sha256, PublishedFile("n", "u", "", "some/repository"))
