"""Statistics files of every layout, laid out here as their own tools do, and what is no statistics."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation import statistics_files
from evaluation.metrics.moments import Moments
from evaluation.statistics_files import Origin, Statistics, read_statistics, write_statistics
from fdistill.base.errors import DataError, OutputError
from fdistill.base.files import sha256_of_files
from fdistill.formats.unpickle import loads_restricted
from support.pickles import EasyDict, dumps

COUNT, INCEPTION_WIDTH, DINOV2_WIDTH = 40, 48, 24
IMAGES = np.random.default_rng(1).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 20 kB in place of 34 MB, but for tests of the real sizes."""
    if "real_size" not in request.node.name:
        widths = (INCEPTION_WIDTH, INCEPTION_WIDTH, DINOV2_WIDTH)
        monkeypatch.setattr(statistics_files, "_WIDTHS", dict(zip(statistics_files._WIDTHS, widths, strict=True)))


def features(width: int = INCEPTION_WIDTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 1, (COUNT, width)).astype(np.float32)


def statistics(rows: np.ndarray) -> dict[str, np.ndarray]:
    exact = rows.astype(np.float64)
    return {"mu": exact.mean(0), "sigma": np.cov(exact, rowvar=False)}


INCEPTION, DINOV2 = statistics(features()), statistics(features(DINOV2_WIDTH, 1))


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def pkl(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(dumps(content, protocol))
    return path


def pt(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def holds(reference: Statistics, name: str, expected: dict[str, np.ndarray]) -> None:
    moments = reference.moments[name]
    assert moments.mean.dtype == moments.covariance.dtype == torch.float64
    assert np.allclose(moments.mean.numpy(), expected["mu"], rtol=0, atol=1e-12)
    assert np.allclose(moments.covariance.numpy(), expected["sigma"], rtol=0, atol=1e-12)


def test_edms_npz(tmp_path: Path) -> None:
    path = npz(tmp_path / "cifar10-32x32.npz", **INCEPTION)
    found = read_statistics(path)
    holds(found, "inception.pool", INCEPTION)
    assert (found.name, found.kind, found.count, found.resolution) == ("cifar10-32x32.npz", "EDM npz", None, 32)
    assert found.sha256 == sha256_of_files([path])
    assert found.images is None
    assert not found.rows
    assert found.moments.keys() == {"inception.pool"}
    assert read_statistics(npz(tmp_path / "other.npz", **INCEPTION)).resolution is None


def test_files_of_their_real_size(tmp_path: Path) -> None:
    inception, dinov2 = statistics(features(2048)), statistics(features(1024, 1))
    holds(read_statistics(npz(tmp_path / "x.npz", **inception)), "inception.pool", inception)
    holds(read_statistics(pkl(tmp_path / "x.pkl", {"fd_dinov2": dinov2})), "dinov2.cls", dinov2)
    holds(read_statistics(pt(tmp_path / "x.pt", inception)), "inception.pool", inception)
    for name, statistic in (("clean_clean_train_32", dinov2), ("x-32x32", dinov2)):
        with pytest.raises(DataError, match="with 1024 features; expected 2048"):
            read_statistics(npz(tmp_path / f"{name}.npz", **statistic))


def test_adms_npz_is_its_mu_and_sigma_not_its_images(tmp_path: Path) -> None:
    spatial = {"mu_s": np.ones(2023), "sigma_s": np.eye(2023)}
    found = read_statistics(npz(tmp_path / "VIRTUAL_imagenet256_labeled.npz", arr_0=IMAGES, **INCEPTION, **spatial))
    holds(found, "inception.pool", INCEPTION)
    assert found.moments.keys() == {"inception.pool"}
    assert (found.kind, found.count, found.resolution) == ("ADM npz", None, 16)
    assert found.images is not None
    assert torch.equal(found.images.read(range(7)), torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()))
    assert "7 images" in found.facts["images"]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_edm2s_pickle(protocol: int, tmp_path: Path) -> None:
    content = EasyDict(fid=EasyDict(INCEPTION), fd_dinov2=dict(DINOV2), num_images=50_000)
    found = read_statistics(pkl(tmp_path / "img512.pkl", content, protocol))
    holds(found, "inception.pool", INCEPTION)
    holds(found, "dinov2.cls", DINOV2)
    assert (found.kind, found.resolution) == ("EDM2 pickle", 512)
    alone = read_statistics(pkl(tmp_path / "x.pkl", {"fid": INCEPTION}, protocol))
    assert (alone.moments.keys(), alone.resolution) == ({"inception.pool"}, None)


def test_torch_fidelitys_statistics(tmp_path: Path) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics

    rows = features()
    content = fid_features_to_statistics(torch.from_numpy(rows))
    found = read_statistics(pt(tmp_path / "mine-inception-v3-compat-stat-fid-2048.pt", content))
    holds(found, "inception.pool", content)
    assert (found.kind, found.count, found.resolution) == ("torch-fidelity", None, None)
    holds(read_statistics(pt(tmp_path / "renamed.pt", content)), "inception.pool", content)


def test_torch_fidelitys_features(tmp_path: Path) -> None:
    rows = torch.from_numpy(features())
    found = read_statistics(pt(tmp_path / "mine-inception-v3-compat-features-2048.pt", rows))
    holds(found, "inception.pool", INCEPTION)
    assert (found.kind, found.count) == ("torch-fidelity", COUNT)
    assert torch.equal(found.rows["inception.pool"], rows)
    for name in (
        "mine-inception-v3-compat-features-768.pt",
        "mine-vgg16-features-2048.pt",
        "a-clip-rn50-stat-fid-2048.pt",
    ):
        with pytest.raises(DataError, match="its name says that it is of another extractor or layer"):
            read_statistics(pt(tmp_path / name, rows))
    for content, what in (
        (rows[:, :30], r"\[40, 30\]"),
        (rows[0], r"\[48\]"),
        (rows[:1], r"\[1, 48\]"),
        ([], "list"),
    ):
        with pytest.raises(DataError, match=rf"holds {what}; expected 'mu' and 'sigma', or features \[N, 48\]"):
            read_statistics(pt(tmp_path / "x.pt", content))
    rows[3, 5] = float("nan")
    with pytest.raises(DataError, match="row 3"):
        read_statistics(pt(tmp_path / "x.pt", rows))


@pytest.mark.parametrize(
    ("name", "features_of", "resolution"),
    [
        ("cifar10_legacy_tensorflow_train_32", "inception.pool", 32),
        ("cifar10_clean_train_32", "inception-clean.pool", 32),
        ("ffhq_clean_trainval70k_256", "inception-clean.pool", 256),
        ("my_clean_set_clean_custom_na", "inception-clean.pool", None),
    ],
)
def test_clean_fids_npz(name: str, features_of: str, resolution: int | None, tmp_path: Path) -> None:
    found = read_statistics(npz(tmp_path / f"{name}.npz", **INCEPTION))
    holds(found, features_of, INCEPTION)
    assert found.moments.keys() == {features_of}
    assert (found.kind, found.resolution) == ("clean-fid", resolution)


@pytest.mark.parametrize("name", ["cifar10_legacy_pytorch_train_32", "ffhq_clean_clip_vit_b_32_trainval70k_1024"])
def test_clean_fids_other_features_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="whose features fdistill does not compute"):
        read_statistics(npz(tmp_path / f"{name}.npz", **INCEPTION))


def own(path: Path, *, rows: bool = True, **changes: Any) -> Path:
    kept = {"inception.pool": features(), "digits.features": features(12, 2)}
    settings: dict[str, Any] = {
        "protocol": "digits",
        "extractors": {"inception": {"sha256": "ab", "preparation": "resized"}},
        "count": COUNT,
        "resolution": None,
        "source": "digits",
        "source_sha256": "cd",
    }
    moments = {name: Moments.of(torch.from_numpy(values)) for name, values in kept.items()}
    held = {name: torch.from_numpy(values) for name, values in kept.items()} if rows else None
    return write_statistics(path, moments, Origin(**settings | changes), held)


def test_our_own_file_comes_back_and_other_tools_read_it(tmp_path: Path) -> None:
    path = own(tmp_path / "own.npz", resolution=64)
    assert [child.name for child in tmp_path.iterdir()] == ["own.npz"]
    found = read_statistics(path)
    holds(found, "inception.pool", INCEPTION)
    holds(found, "digits.features", statistics(features(12, 2)))
    assert (found.kind, found.count, found.resolution, found.images) == ("fdistill", COUNT, 64, None)
    assert {name: moments.count for name, moments in found.moments.items()} == dict.fromkeys(found.moments, COUNT)
    assert torch.equal(found.rows["digits.features"], torch.from_numpy(features(12, 2)))
    assert found.rows.keys() == found.moments.keys()
    assert found.facts == {
        "protocol": "digits",
        "extractors": {"inception": {"sha256": "ab", "preparation": "resized"}},
        "source": "digits",
        "source_sha256": "cd",
    }
    with np.load(path, allow_pickle=False) as arrays:
        assert np.allclose(arrays["mu"], INCEPTION["mu"], atol=1e-12)
        assert np.allclose(arrays["sigma"], INCEPTION["sigma"], atol=1e-12)
    without = read_statistics(own(tmp_path / "small", rows=False, source_sha256=None))
    assert (without.rows, without.resolution, without.facts["source_sha256"]) == ({}, None, None)
    digits = {"digits.features": Moments.of(torch.from_numpy(features(12, 2)))}
    path = write_statistics(tmp_path / "digits.npz", digits, Origin("digits", {}, COUNT, 8, "x", None))
    with np.load(path) as arrays:
        assert "mu" not in arrays.files


def test_an_own_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        own(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        own(tmp_path / "file" / "own.npz")


def changed(path: Path, **changes: Any) -> Path:
    with np.load(path) as arrays:
        kept = {name: arrays[name] for name in arrays.files} | changes
    return npz(path.with_name("changed.npz"), **{name: value for name, value in kept.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facts": np.array("{")}, "its facts are not as `fdistill reference` writes them"),
        ({"facts": np.array("[]")}, "its facts are not as `fdistill reference` writes them"),
        (
            {"facts": np.array('{"format": 1, "count": 40, "resolution": null}')},
            "its facts are not as `fdistill reference` writes them",
        ),
        (
            {"facts": np.array('{"format": 2, "count": 40, "resolution": null, "extractors": {}}')},
            "its facts are not as `fdistill reference` writes them .*format 2",
        ),
        ({"facts": np.array('{"format": 1, "count": "4", "resolution": 8, "extractors": {}}')}, "count 4"),
        (
            {"facts": np.array('{"format": 1, "count": 1, "resolution": 8, "extractors": {}}'), "rows": None},
            "at least 2",
        ),
        ({"inception.pool/sigma": None, "digits.features/sigma": None}, "no statistics in it"),
        (
            {"digits.features/rows": np.zeros((39, 12), np.float32)},
            r"rows of digits\.features are torch\.float32 \[39, 12\]",
        ),
        ({"digits.features/mu": np.zeros(11)}, r"digits\.features: mu float64 \[11\] and sigma float64 \[12, 12\]"),
    ],
)
def test_our_own_file_damaged(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_statistics(changed(own(tmp_path / "own.npz", rows="rows" not in changes), **changes))


def bad(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (INCEPTION | changes).items() if value is not None}


def with_entry(array: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"feats": features()}, "arrays feats; expected statistics of EDM"),
        ({"arr_0": IMAGES}, "arrays arr_0; expected statistics of EDM"),
        (bad(sigma=None), "arrays mu; expected statistics"),
        (DINOV2, r"inception\.pool: is of another extractor, with 24 features; expected 48"),
        (bad(sigma=INCEPTION["sigma"][:-1]), r"sigma float64 \[47, 48\]; expected numbers"),
        (bad(sigma=INCEPTION["sigma"][:-1, :-1]), r"sigma float64 \[47, 47\]; expected numbers"),
        (bad(mu=INCEPTION["mu"][None]), r"mu float64 \[1, 48\]"),
        (bad(mu=np.zeros(48, "U3")), r"mu <U3 \[48\]"),
        (bad(mu=np.array([{}])), "cannot be read as statistics"),
        (bad(mu=with_entry(INCEPTION["mu"], (7,), np.nan)), "contains NaN or infinity"),
        (bad(sigma=with_entry(INCEPTION["sigma"], (3, 7), np.inf)), "contains NaN or infinity"),
        (bad(sigma=with_entry(INCEPTION["sigma"], (3, 7), 0.5)), "sigma is not symmetric"),
        (bad(sigma=-INCEPTION["sigma"]), "variances are negative or all zero"),
        (bad(sigma=np.zeros((48, 48))), "variances are negative or all zero"),
    ],
)
def test_what_is_no_statistics(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=rf"reference {path}: .*{message}"):
        read_statistics(path)


def test_single_precision_is_read(tmp_path: Path) -> None:
    rounded = {key: value.astype(np.float32) for key, value in INCEPTION.items()}
    holds(read_statistics(npz(tmp_path / "x.npz", **rounded)), "inception.pool", rounded)
    swapped = {key: value.astype(">f8") for key, value in INCEPTION.items()}
    holds(read_statistics(npz(tmp_path / "y.npz", **swapped)), "inception.pool", INCEPTION)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fid": {"mu": INCEPTION["mu"]}}, "each with 'mu' and 'sigma'"),
        ({"fid": 3.5}, "each with 'mu' and 'sigma'"),
        ({"other": INCEPTION}, "a pickle without 'fid' or 'fd_dinov2'"),
        ([INCEPTION], "a pickle without 'fid' or 'fd_dinov2'"),
        ({"fid": DINOV2}, r"inception\.pool: is of another extractor, with 24 features; expected 48"),
        ({"fd_dinov2": INCEPTION}, r"dinov2\.cls: is of another extractor, with 48 features; expected 24"),
        ({"fid": {"mu": "text", "sigma": None}}, "expected numbers"),
    ],
)
def test_pickles_of_something_else(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_statistics(pkl(tmp_path / "x.pkl", content))


@pytest.mark.parametrize("cut", [0, 3, 5000])
@pytest.mark.parametrize(
    "write", [lambda p: npz(p, **INCEPTION), lambda p: pkl(p, {"fid": INCEPTION}), lambda p: pt(p, INCEPTION)]
)
def test_files_cut_short(write: Callable[[Path], Path], cut: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=rf"reference {path}"):
        read_statistics(path)


def test_files_with_changed_bytes(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **INCEPTION)
    damaged = bytearray(buffer.getvalue())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 50] = bytes(50)
    (tmp_path / "x.npz").write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be read as statistics"):
        read_statistics(tmp_path / "x.npz")


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.npz", tmp_path):
        with pytest.raises(DataError, match=rf"reference {path}: cannot be read as statistics"):
            read_statistics(path)


class Attack:
    """Pickled as a call that leaves a file behind."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def attacks(marker: Path, folder: Path) -> list[Path]:
    attack = Attack(marker)
    inside = np.array([attack], dtype=object)
    contents: list[object] = [attack, {"fid": INCEPTION, "more": attack}, {"fid": {"mu": inside, "sigma": attack}}]
    contents += [INCEPTION | {"more": attack}, {"rows": torch.zeros(3, 48), "more": attack}]
    paths = [pkl(folder / f"{number}.pkl", content) for number, content in enumerate(contents)]
    paths += [pt(folder / f"{number}.pt", content) for number, content in enumerate(contents)]
    np.savez(folder / "a.npz", mu=inside, sigma=INCEPTION["sigma"])
    np.savez(folder / "b.npz", facts=inside, **INCEPTION)
    with zipfile.ZipFile(folder / "c.npz", "w") as archive:
        archive.writestr("mu.npy", pickle.dumps(attack))
        archive.writestr("sigma.npy", pickle.dumps(attack))
    return [*paths, *(folder / f"{name}.npz" for name in "abc")]


def test_nothing_in_any_file_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    paths = attacks(marker, tmp_path)
    assert len(paths) == 13
    for path in paths:
        with pytest.raises(DataError, match=rf"reference {path}"):
            read_statistics(path)
        # Under the names of all kinds, as it is the content that tells.
        for other in ("x.npz", "x.pkl", "x-inception-v3-compat-stat-fid-2048.pt"):
            (tmp_path / other).write_bytes(path.read_bytes())
            with pytest.raises(DataError):
                read_statistics(tmp_path / other)
    assert not marker.exists()
    pickle.loads(paths[0].read_bytes())
    assert marker.exists()


def test_pickles_in_memory_are_restricted_too() -> None:
    from fdistill.base.errors import CheckpointError

    assert loads_restricted(pickle.dumps({"a": [1, 2.5]}), "here") == {"a": [1, 2.5]}
    with pytest.raises(CheckpointError, match=r"here: refused .*system"):
        loads_restricted(pickle.dumps(Attack(Path("x"))), "here")
    with pytest.raises(CheckpointError, match="here: is empty"):
        loads_restricted(b"", "here")
    with pytest.raises(CheckpointError, match="here: ends in the middle"):
        loads_restricted(pickle.dumps([1, 2, 3])[:-3], "here")


def test_a_reference_serves_the_distance(tmp_path: Path) -> None:
    """End to end: the distance of a set to statistics of itself, through each kind of file."""
    from evaluation.metrics.frechet import frechet_distance

    rows = features(32, 3)
    tensor: Tensor = torch.from_numpy(rows)
    shifted = Moments.of(tensor + 0.5)
    origin = Origin("folder", {}, COUNT, None, "x", None)
    own_file = write_statistics(tmp_path / "own.npz", {"x.y": Moments.of(tensor)}, origin)
    found = read_statistics(own_file).moments["x.y"]
    assert abs(frechet_distance(Moments.of(tensor), found)) < 1e-6
    assert abs(frechet_distance(shifted, found) - 32 * 0.25) < 1e-5
