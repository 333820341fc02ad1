"""Students that others trained, as small files of FastGen, DMD2 and SiD: one evaluation against its formula."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from fdistill import distill, load_student, load_teacher
from fdistill.assets import EMBEDDED_TEACHERS
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.commands.cli import app
from fdistill.condition import TextCondition
from fdistill.networks import EDM2Network, EDMNetwork
from fdistill.students.convert import convert_any
from fdistill.teachers.convert import Elsewhere
from support.families import randomised, tiny_vae
from support.pickles import dumps, edm2_content, edm_content, published_names
from support.thorough import at_night
from support.tiny_stable_diffusion import tiny_pipeline

EDM: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 4,
    "model_type": "SongUNet",
    "augment_dim": 9,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
EDM2: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 4,
    "label_dim": 4,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 8,
}
NAMES = "80 for EDM students of DMD2 and FastGen, 2.5 for SiD's"


def other_weights(network: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for tensor in network.parameters():
        tensor.data = torch.randn_like(tensor) * 0.1
    return network.eval()


@pytest.fixture
def edm(tmp_path: Path) -> Path:
    """The folder of an EDM teacher."""
    other_weights(EDMNetwork(**EDM), 0).save_pretrained(tmp_path / "teacher")  # type: ignore[operator]
    return tmp_path / "teacher"


def edm_x0(network: Any, noise: Tensor, labels: Tensor, sigma: float) -> Tensor:
    """One evaluation as EDM's preconditioning has it (arXiv 2206.00364, table 1)."""
    x, data, level = sigma * noise, 0.5, torch.full((len(noise),), sigma)
    rows = F.one_hot(labels, 4).float()
    with torch.no_grad():
        output = network(x / (sigma**2 + data**2) ** 0.5, level.log() / 4, rows)
    result: Tensor = data**2 / (sigma**2 + data**2) * x + sigma * data / (sigma**2 + data**2) ** 0.5 * output
    return result


def inputs(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, channels, 8, 8, generator=generator), torch.tensor([0, 3, 1, 2])


def with_uncertainty(network: nn.Module) -> dict[str, Tensor]:
    """FastGen's EDM networks also estimate their own uncertainty."""
    extra = {"model.logvar_linear.weight": torch.randn(1, 16), "model.logvar_linear.bias": torch.zeros(1)}
    return dict(network.state_dict()) | extra


def fastgen(path: Path, **networks: dict[str, Tensor]) -> Path:
    """A checkpoint of FastGen: networks by their roles, and the state of everything else."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    content = {"model": networks, "optimizer": {"net": optimizer.state_dict()}, "iteration": 600_000}
    torch.save(content | {"scheduler": {}, "grad_scaler": {"scale": 1.0}, "callbacks": {}}, path)
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_student_of_fastgen_on_edm(edm: Path, tmp_path: Path) -> None:
    networks = {name: other_weights(EDMNetwork(**EDM), i) for i, name in enumerate(("net", "ema_1", "ema_9999"), 1)}
    roles = {name: with_uncertainty(network) for name, network in networks.items()}
    file = fastgen(tmp_path / "0600000.pth", **roles, fake_score=roles["net"])
    arguments = ("convert", file, "--like", edm, "--student-level", 80)
    with pytest.raises(ArgumentError, match=r"weights: .* holds net, ema_1, ema_9999, fake_score; pass the one"):
        run(*arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    noise, labels = inputs(3)
    for name, network in networks.items():
        folder = tmp_path / name
        assert run(*arguments, "--weights", name, "--output", folder) == f"student: {folder}\n"
        expected = edm_x0(network, noise, labels, 80.0)
        torch.testing.assert_close(load_student(folder)(noise, labels), expected, rtol=1e-5, atol=1e-5)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    card = (folder / "README.md").read_text()
    assert "0600000.pth, sha256" in card
    assert "Training" not in card
    assert "samples.png" not in card


def test_one_average_is_chosen_and_so_is_a_network_alone(edm: Path, tmp_path: Path) -> None:
    noise, labels = inputs(3)
    first, second = (other_weights(EDMNetwork(**EDM), seed) for seed in (1, 2))
    both = fastgen(tmp_path / "both.pth", net=dict(first.state_dict()), ema=dict(second.state_dict()))
    one = fastgen(tmp_path / "one.pth", net=dict(first.state_dict()))
    torch.save(first.state_dict(), tmp_path / "flat.pth")
    for file, network in ((both, second), (one, first), (tmp_path / "flat.pth", first)):
        kind, folder = convert_any(file, tmp_path / file.stem, "80", elsewhere=Elsewhere(like=str(edm)))
        assert kind == "student"
        expected = edm_x0(network, noise, labels, 80.0)
        torch.testing.assert_close(load_student(folder)(noise, labels), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentError, match=r"weights: got 'ema', but .*flat\.pth holds one network without a name"):
        convert_any(tmp_path / "flat.pth", tmp_path / "x", "80", elsewhere=Elsewhere(str(edm), weights="ema"))


def test_a_student_of_fastgen_on_edm2(tmp_path: Path) -> None:
    """FastGen holds the output's gain as a list of one number; the autoencoder comes from the teacher's folder."""
    settings = EDM2 | {"latent_scale": [0.1] * 4, "latent_bias": [0.0] * 4}
    other_weights(EDM2Network(**settings), 0).save_pretrained(tmp_path / "teacher")  # type: ignore[operator]
    network = other_weights(EDM2Network(**settings), 1)
    tensors = dict(network.state_dict())
    tensors["unet.out_gain"] = tensors["unet.out_gain"].reshape(1)
    file = fastgen(tmp_path / "edm2.pth", net=tensors)
    known = Elsewhere(like=str(tmp_path / "teacher"))
    with pytest.raises(CheckpointError, match="autoencoder that is not in the folder"):
        convert_any(file, tmp_path / "student", "80", elsewhere=known)
    assert not (tmp_path / "student").exists()
    tiny_vae().save_pretrained(tmp_path / "teacher" / "vae")
    _, folder = convert_any(file, tmp_path / "student", "80", elsewhere=known)
    noise, labels = inputs(4)
    expected = edm_x0(network, noise, labels, 80.0)
    torch.testing.assert_close(load_student(folder)(noise, labels), expected, rtol=1e-5, atol=1e-5)
    run("generate", folder, "--num-images", 2, "--output", tmp_path / "images", "--device", "cpu")
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


@pytest.mark.parametrize("prefix", ["", "feedforward_model.", "module."])
def test_a_student_of_dmd2_on_edm(prefix: str, edm: Path, tmp_path: Path) -> None:
    """DMD2 deletes the layer of augmentation labels, and its training states hold the fake score too."""
    network = other_weights(EDMNetwork(**EDM), 1)
    kept = {prefix + name: value for name, value in network.state_dict().items() if "map_augment" not in name}
    others = (
        {"guidance_model.fake_unet.model.map_layer0.bias": torch.zeros(3)} if prefix == "feedforward_model." else {}
    )
    torch.save(kept | others, tmp_path / "pytorch_model.bin")
    _, folder = convert_any(tmp_path / "pytorch_model.bin", tmp_path / "s", "80", elsewhere=Elsewhere(like=str(edm)))
    noise, labels = inputs(3)
    expected = edm_x0(network, noise, labels, 80.0)  # augmentation labels are zeros in sampling
    torch.testing.assert_close(load_student(folder)(noise, labels), expected, rtol=1e-5, atol=1e-5)


KINDS = [("sd1", "999"), ("xl", "399"), ("xl", "999,749,499,249")]
NAMED = [(kind, levels, wrapper) for wrapper in ("", "unet.") for kind, levels in KINDS]


@pytest.mark.parametrize(
    ("kind", "levels", "wrapper"), at_night(NAMED, lambda named: named not in (NAMED[0], NAMED[-1]))
)
def test_a_text_to_image_student_under_the_names_of_diffusers(
    kind: str, levels: str, wrapper: str, tmp_path: Path
) -> None:
    """DMD2 saves the UNet alone, FastGen as the part `unet` of its network, with an estimate of its uncertainty."""
    base = tiny_pipeline(kind, tmp_path / "base")
    unet = other_weights(UNet2DConditionModel.from_pretrained(base, subfolder="unet"), 5)
    tensors = {wrapper + name: value for name, value in unet.state_dict().items()}
    if wrapper:
        tensors |= {"unet.logvar_linear.weight": torch.ones(1, 3), "unet.logvar_linear.bias": torch.ones(1)}
    file = fastgen(tmp_path / "net.pth", net=tensors) if wrapper else tmp_path / "pytorch_model.bin"
    if not wrapper:
        torch.save(tensors, file)
    known = Elsewhere(base=str(base))
    with pytest.raises(ArgumentError, match=r"student_level: .* 999 for Stable Diffusion 1\.5; 399 for DMD2's SDXL"):
        convert_any(file, tmp_path / "student", None, elsewhere=known)
    _, folder = convert_any(file, tmp_path / "student", levels, elsewhere=known)
    student = load_student(folder)
    assert list(student.levels) == [float(level) for level in levels.split(",")]

    torch.manual_seed(0)
    shapes = student.denoiser.text_shapes or {}
    condition = TextCondition({name: torch.randn(2, *shape) for name, shape in shapes.items()})
    steps = len(student.levels)
    noise = torch.randn(2, steps, 4, 4, 4) if steps > 1 else torch.randn(2, 4, 4, 4)
    betas = torch.linspace(1e-4**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0).sqrt()
    added = {name: condition[name] for name in ("text_embeds", "time_ids")} if kind == "xl" else None
    x0 = torch.zeros(2, 4, 4, 4)
    for k, level in enumerate(map(int, student.levels)):
        alpha, sigma = float(alphas[level]), float((1 - alphas[level] ** 2).sqrt())
        x = alpha * x0 + sigma * noise[:, k] if k else (noise[:, 0] if steps > 1 else noise)
        with torch.no_grad():
            eps = unet(x, level, condition["prompt_embeds"], added_cond_kwargs=added).sample
        x0 = (x - sigma * eps) / alpha
    found = student(noise, condition)
    torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-4 * float(x0.abs().max()))


def test_a_student_of_sid(tmp_path: Path) -> None:
    """SiD pickles the average of the student alone, under the name that EDM gives its teacher."""
    network = other_weights(EDMNetwork(**EDM), 1)
    content = {"ema": edm_content(network, tmp_path / "ran", use_fp16=False, **EDM)["ema"]}
    file = tmp_path / "network-snapshot-1.200000-500000.pkl"
    file.write_bytes(dumps(content))
    with pytest.raises(ArgumentError, match=rf"student_level: .* as SiD writes its students\): {NAMES}"):
        convert_any(file, tmp_path / "student", None)
    noise, labels = inputs(3)
    assert run("convert", file, "--student-level", "2.5", "--output", tmp_path / "student").startswith("student: ")
    expected = edm_x0(network, noise, labels, 2.5)
    torch.testing.assert_close(load_student(tmp_path / "student")(noise, labels), expected, rtol=1e-5, atol=1e-5)
    assert run("convert", file, "--student-level", "none", "--output", tmp_path / "t").startswith("teacher: ")
    assert load_teacher(tmp_path / "t").schedule.t_max == 80
    assert not (tmp_path / "ran").exists()


def test_a_student_of_sid_on_edm2(tmp_path: Path) -> None:
    network = other_weights(EDM2Network(**EDM2), 1)
    tiny_vae().save_pretrained(tmp_path / "teacher" / "vae")
    other_weights(EDM2Network(**EDM2), 0).save_pretrained(tmp_path / "teacher")  # type: ignore[operator]
    content = {"ema": edm2_content(network, tmp_path / "ran", None, **EDM2)["ema"]}
    (tmp_path / "sid.pkl").write_bytes(dumps(content))
    known = Elsewhere(like=str(tmp_path / "teacher"))
    _, folder = convert_any(tmp_path / "sid.pkl", tmp_path / "student", "2.5", elsewhere=known)
    student = load_student(folder)
    noise, labels = inputs(4)
    expected = edm_x0(network, noise, labels, 2.5)
    torch.testing.assert_close(student(noise, labels), expected, rtol=1e-5, atol=1e-5)
    scaling = student.denoiser.latent_scaling
    assert scaling is not None
    assert tuple(scaling.pixel_range) == (0, 1)


class EDMPrecond:
    """A network in a module of its own, without torch_utils.persistence."""

    def __init__(self, state: dict[str, Any]):
        self.__dict__.update(state)


def test_a_pickle_under_another_module_path_takes_its_settings_from_its_teacher(edm: Path, tmp_path: Path) -> None:
    network = other_weights(EDMNetwork(**EDM), 1)
    state = edm_content(network, tmp_path / "ran", **EDM)["ema"].state
    plain = EDMPrecond({name: value for name, value in state.items() if not name.startswith("_init")})
    with pytest.MonkeyPatch.context() as patch, published_names():
        for name in ("sid", "sid.networks"):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setattr(sys.modules["sid.networks"], "EDMPrecond", EDMPrecond, raising=False)
        patch.setattr(EDMPrecond, "__module__", "sid.networks")
        (tmp_path / "sid.pkl").write_bytes(pickle.dumps({"ema": plain}))
    with pytest.raises(ArgumentError, match=r"like: .* without the settings"):
        convert_any(tmp_path / "sid.pkl", tmp_path / "student", "2.5")
    _, folder = convert_any(tmp_path / "sid.pkl", tmp_path / "student", "2.5", elsewhere=Elsewhere(like=str(edm)))
    noise, labels = inputs(3)
    expected = edm_x0(network, noise, labels, 2.5)
    torch.testing.assert_close(load_student(folder)(noise, labels), expected, rtol=1e-5, atol=1e-5)


def test_a_converted_student_is_generated_from_and_trained_on(edm: Path, tmp_path: Path) -> None:
    network = other_weights(EDMNetwork(**EDM), 1)
    torch.save(network.state_dict(), tmp_path / "net.pth")
    _, folder = convert_any(tmp_path / "net.pth", tmp_path / "student", "80", elsewhere=Elsewhere(like=str(edm)))
    run("generate", folder, "--num-images", 4, "--output", tmp_path / "images", "--device", "cpu")
    assert len(list((tmp_path / "images").glob("*.png"))) == 4
    settings = {"batch_size": 4, "iterations": 1, "data": None, "method": "diff-instruct", "log.tracker": "none"}
    settings |= {"student_level": 80, "log.samples_every": 0, "generator.lr": 1e-30}
    student = distill("digits", output=tmp_path / "run", teacher=str(edm), **settings | {"student.checkpoint": folder})
    noise, labels = inputs(3)
    expected = edm_x0(network, noise, labels, 80.0)
    torch.testing.assert_close(load_student(student)(noise, labels), expected, rtol=1e-5, atol=1e-5)
    # as a teacher, it is the same network
    own = load_teacher(folder)(80 * noise, torch.full((4,), 80.0), labels)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_a_teacher_of_fastgen_is_converted_too(edm: Path, tmp_path: Path) -> None:
    """FastGen keeps EDM's pickles as state dicts."""
    network = other_weights(EDMNetwork(**EDM), 1)
    torch.save(network.state_dict(), tmp_path / "edm-cifar10-32x32-cond-vp.pth")
    known = Elsewhere(like=str(edm))
    with pytest.raises(ArgumentError, match=rf"student_level: .* {NAMES}.*; none, if this is a teacher"):
        convert_any(tmp_path / "edm-cifar10-32x32-cond-vp.pth", tmp_path / "out", None, elsewhere=known)
    kind, folder = convert_any(tmp_path / "edm-cifar10-32x32-cond-vp.pth", tmp_path / "out", "none", elsewhere=known)
    assert kind == "teacher"
    noise, labels = inputs(3)
    expected = edm_x0(network, noise, labels, 2.0)
    found = load_teacher(folder)(2 * noise, torch.full((4,), 2.0), labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_a_file_does_not_say_is_asked_by_name(edm: Path, tmp_path: Path) -> None:
    def asked(tensors: dict[str, Tensor], message: str, level: str | None = None, **known: str) -> None:
        torch.save(tensors, tmp_path / "net.pth")
        with pytest.raises((ArgumentError, CheckpointError), match=message):
            convert_any(tmp_path / "net.pth", tmp_path / "out", level, elsewhere=Elsewhere(**known))
        assert not (tmp_path / "out").exists()

    one = torch.zeros(1)
    edm_tensors = dict(EDMNetwork(**EDM).state_dict())
    asked(edm_tensors, rf"like: .* tensors of an EDM network.*; and student_level: {NAMES}")
    asked({"unet.emb_noise.weight": one, "logvar_fourier.freqs": one}, "like: .* tensors of an EDM2 network")
    asked({"down_blocks.0.weight": one}, "base: .*stable-diffusion-xl-base-1.0.*student_level")
    asked({"y_embedder.embedding_table.weight": one}, "family: .* pass 'dit' or 'sit'")
    asked({"other.weight": one}, r"family: .* such as 'other\.weight', are of no known network")
    asked({}, "holds no state dict")
    asked(edm_tensors, "level: expected a number in", "90", like=str(edm))
    asked(edm_tensors, "student_level: got 'eighty'; expected 80 for", "eighty", like=str(edm))
    asked(edm_tensors | {"model.more": one}, r"tensor model\.more has no place", "80", like=str(edm))
    asked(edm_tensors, "two descriptions of one network", "80", like=str(edm), base=str(edm))
    del edm_tensors["model.map_layer0.bias"]
    asked(edm_tensors, r"tensor model\.map_layer0\.bias is missing", "80", like=str(edm))
    base = tiny_pipeline("sd1", tmp_path / "base")
    asked({"down_blocks.0.weight": one}, "is a text-to-image pipeline; pass it as base", "999", like=str(base))
    asked({"down_blocks.0.weight": one}, "tensors of its network are not those of teacher_base", "999", base=str(base))


class Call:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_nothing_of_a_file_is_run(edm: Path, tmp_path: Path) -> None:
    content = {"model": {"net": dict(EDMNetwork(**EDM).state_dict())}, "callbacks": Call(f"touch {tmp_path / 'ran'}")}
    base = tiny_pipeline("sd1", tmp_path / "base")
    for known in (Elsewhere(like=str(edm)), Elsewhere(base=str(base))):
        for suffix in ("pth", "bin", "ckpt"):
            torch.save(content, tmp_path / f"net.{suffix}")
            with pytest.raises(CheckpointError, match=r"refused posix\.system"):
                convert_any(tmp_path / f"net.{suffix}", tmp_path / "out", "80", elsewhere=known)
    assert not (tmp_path / "ran").exists()


def test_a_converted_student_is_evaluated(tmp_path: Path) -> None:
    """Any family that fdistill reads is converted like a checkpoint of its architecture, here the embedded teacher."""
    weights = load_file(EMBEDDED_TEACHERS["digits"] / "unet" / "diffusion_pytorch_model.safetensors")
    file = fastgen(tmp_path / "net.pth", net=weights)
    run("convert", file, "--like", "digits", "--student-level", 80, "--output", tmp_path / "student")
    scores = run("evaluate", tmp_path / "student", "--num-images", 100, "--device", "cpu")
    assert "fd_digits" in scores
    found, teacher = load_student(tmp_path / "student"), load_teacher("digits")
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert torch.equal(found(noise, labels), teacher(80 * noise, torch.full((4,), 80.0), labels))


def test_safetensors_are_read_too(edm: Path, tmp_path: Path) -> None:
    network = randomised(EDMNetwork(**EDM)).eval()
    save_file(dict(network.state_dict()), tmp_path / "net.safetensors")
    _, folder = convert_any(tmp_path / "net.safetensors", tmp_path / "s", "80", elsewhere=Elsewhere(like=str(edm)))
    noise, labels = inputs(3)
    expected = edm_x0(network, noise, labels, 80.0)
    torch.testing.assert_close(load_student(folder)(noise, labels), expected, rtol=1e-5, atol=1e-5)
