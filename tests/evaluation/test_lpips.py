from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity import sample_similarity_lpips
from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS

from evaluation.extractors import LPIPS, open_lpips
from evaluation.weights import PUBLISHED
from fdistill.base.errors import ArgumentError, CheckpointError
from support.lpips import WIDTHS, vgg_layers, write_lpips

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    return vgg_layers()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lpips(tmp_path_factory.mktemp("lpips"))


@pytest.fixture(scope="module")
def fidelity(vgg: nn.Module, files: Path) -> SampleSimilarityLPIPS:
    """torch-fidelity's LPIPS; only where its weights come from is replaced."""
    linear = torch.load(files / PUBLISHED["lpips"].name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_similarity_lpips, "load_state_dict_from_url", lambda *_, **__: linear)
        patch.setattr(
            sample_similarity_lpips, "torchvision_load_pretrained_vgg16", lambda: SimpleNamespace(features=vgg)
        )
        return SampleSimilarityLPIPS("lpips-vgg16")


@pytest.fixture(scope="module")
def lpips(files: Path) -> LPIPS:
    return open_lpips(CPU, {"": files})


def pairs(count: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randint(0, 256, (2, count, 3, height, width), dtype=torch.uint8, generator=random)
    return a, b


@pytest.mark.parametrize(("height", "width"), [(16, 16), (64, 48), (33, 50)])
def test_lpips_is_torch_fidelitys(height: int, width: int, lpips: LPIPS, fidelity: SampleSimilarityLPIPS) -> None:
    a, b = pairs(3, height, width)
    expected = fidelity(a, b).flatten()
    assert lpips(a, b).shape == (3,)
    assert torch.allclose(lpips(a, b), expected, rtol=1e-5, atol=0)
    assert expected.min() > 0.01
    assert expected.std() > 1e-4 * expected.mean()


def test_lpips_is_a_distance_of_its_pair(lpips: LPIPS) -> None:
    a, b = pairs(3, 32, 32)
    assert torch.equal(lpips(a, a), torch.zeros(3))
    assert torch.allclose(lpips(a, b), lpips(b, a), rtol=1e-5)
    alone = torch.cat([lpips(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    assert torch.allclose(lpips(a, b), alone, rtol=1e-5)
    nearly = a.clone()
    nearly[:, :, 5, 5] ^= 64
    assert (lpips(a, nearly) < lpips(a, b)).all()


def test_lpips_knows_its_weights(lpips: LPIPS, files: Path) -> None:
    assert lpips.sha256.keys() == {"vgg16", "lpips"}
    assert not lpips.published
    assert not lpips.training
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    assert all("classifier" not in name for name in lpips.state_dict())


def test_pairs_of_another_form_are_refused(lpips: LPIPS) -> None:
    a, b = pairs(2, 32, 32)
    with pytest.raises(ArgumentError, match="pairs of equal shape"):
        lpips(a, b[:1])
    with pytest.raises(ArgumentError, match="16x16 or larger"):
        lpips(*pairs(2, 15, 32))
    with pytest.raises(ArgumentError, match="expected uint8"):
        lpips(a.float(), b)
    with pytest.raises(ArgumentError, match="expected uint8"):
        lpips(a, b[:, :1])


def test_weights_of_another_network_are_refused(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vgg, linear = (files / PUBLISHED[name].name for name in ("vgg16", "lpips"))
    with pytest.raises(CheckpointError, match="are not the weights of LPIPS"):
        open_lpips(CPU, {"vgg16": vgg, "lpips": vgg})
    with pytest.raises(CheckpointError, match="are not the weights of LPIPS"):
        open_lpips(CPU, {"vgg16": linear, "lpips": linear})
    swapped = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(WIDTHS[::-1])}
    torch.save(swapped, tmp_path / "swapped.pth")
    with pytest.raises(CheckpointError, match=r"lin0\.model\.1\.weight: got \[1, 512, 1, 1\]"):
        open_lpips(CPU, {"vgg16": vgg, "lpips": tmp_path / "swapped.pth"})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="--weights lpips=PATH"):
        open_lpips(CPU, {"vgg16": vgg})
