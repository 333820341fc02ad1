"""Every family keeps to the written protocol; and what a new one takes: one file and one row."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin

from fdistill import OneStepPipeline, distill, generate, load_student, load_teacher
from fdistill.adapters import FAMILIES, network_components, original_layout, wrap
from fdistill.adapters.family import Family, TextToImage, no_embedded_guidance
from fdistill.adapters.original_names import make_layout
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.adapters.text_to_image import TextDenoiser
from fdistill.base.errors import CheckpointError
from fdistill.commands.inspect import inspect as inspected
from fdistill.commands.smoke import smoke_config
from fdistill.commands.tiny_pipelines import tiny_pipeline
from fdistill.formats import comfy
from support.conv_family import FAMILY, ConvNet

TEXT: dict[str, TextToImage] = {name: family.text for name, family in FAMILIES.items() if family.text is not None}
#: Families whose original names are not those of diffusers.
TABLES = [name for name, family in FAMILIES.items() if family.original_layout and name != "QwenImageTransformer2DModel"]
TINY = [(name, pipeline) for name, text in TEXT.items() for pipeline in text.tiny]


def accepts(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with this many positional arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_provides_what_it_must_and_may(name: str) -> None:
    family = FAMILIES[name]
    assert family.network.__name__ == name
    assert issubclass(family.network, ModelMixin)
    assert importlib.import_module(family.wrap.__module__).FAMILY is family  # the last line of its file
    assert accepts(family.wrap, 2)
    assert accepts(family.native_pipeline, 4)
    assert family.component in network_components()
    if family.comfy_checkpoint is not None:
        module, _, function = family.comfy_checkpoint.partition(":")
        assert accepts(getattr(importlib.import_module(module), function), 2)
    assert family.original_layout is None or accepts(family.original_layout, 2)


@pytest.mark.parametrize("name", TABLES)
def test_a_tensor_without_an_original_name_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'nobody\.knows\.this' has no name"):
        original_layout(name, ["nobody.knows.this"], {"layers_per_block": 1})


@pytest.mark.parametrize("name", TEXT)
def test_what_a_text_family_says_of_its_pipelines_is_so(name: str) -> None:
    family, text = FAMILIES[name], TEXT[name]
    classes = [getattr(diffusers, pipeline) for pipeline in text.pipelines]
    assert classes
    assert all(issubclass(cls, DiffusionPipeline) for cls in classes)
    constructed = set.union(*({*inspect.signature(cls.__init__).parameters} for cls in classes))
    assert {family.component, *text.tokenizers} <= constructed
    for cls in classes:
        assert family.component in inspect.signature(cls.__init__).parameters
        told = {*text.unguided} | ({text.guidance_argument} - {None})
        assert told <= inspect.signature(cls.__call__).parameters.keys()
        assert text.encoding_pipeline({"_class_name": cls.__name__}) == cls.__name__
    assert accepts(text.encode_prompts, 3)
    assert accepts(text.encode_null, 3)
    assert accepts(text.fold_guidance, 2)
    assert accepts(text.tokens_before, 1)
    assert text.tiny.keys() <= set(text.pipelines)


@pytest.mark.parametrize(("name", "class_name"), TINY)
def test_a_tiny_pipeline_is_of_its_family(name: str, class_name: str) -> None:
    family, text, pipeline = FAMILIES[name], TEXT[name], tiny_pipeline(class_name)
    assert type(pipeline).__name__ == class_name
    network = getattr(pipeline, family.component)
    assert type(network) is family.network
    assert sum(parameter.numel() for parameter in network.parameters()) < 400_000  # of which Z-Image's time takes most
    denoiser = wrap(network, scheduler_config(pipeline.scheduler))
    assert isinstance(denoiser, TextDenoiser)
    encoders = type(pipeline)(**{**pipeline.components, family.component: None, "vae": None})
    with torch.no_grad():
        for condition in (text.encode_prompts(encoders, ["a seven"], 16), text.encode_null(encoders, "", 16)):
            assert {key: tuple(value.shape[1:]) for key, value in condition.tensors.items()} == denoiser.text_shapes
    assert (denoiser.embedded_guidance is None) or (text.fold_guidance is not no_embedded_guidance)
    if family.original_layout is not None:
        state = network.state_dict()
        layout = original_layout(name, state, network.config)
        assert layout is not None
        named = [part for original in layout.values() for part in original.parts]
        assert sorted(named) == sorted(state)


# --- a new family


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Family:
    """The row that a new family takes."""
    monkeypatch.setitem(FAMILIES, "ConvNet", FAMILY)
    return FAMILY


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ConvNet().save_pretrained(tmp_path / "teacher" / "network")
    DDPMScheduler().save_pretrained(tmp_path / "teacher" / "scheduler")
    return tmp_path / "teacher"


SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "iterations": 3,
    "student_level": 700,
    "generator.lr": 1e-2,
    "discriminator.features": ["middle"],
    "log.tracker": "none",
    "log.samples_every": 0,
}


def test_an_unknown_family_is_refused(teacher: Path) -> None:
    with pytest.raises(CheckpointError, match="network class 'ConvNet' is not supported"):
        load_teacher(teacher)


def test_a_new_family_is_one_file_and_one_row(registered: Family, teacher: Path, tmp_path: Path) -> None:
    loaded: Any = load_teacher(teacher)
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([250.0, 600.0])
    x0, features = loaded.denoise(x_t, t, None, ("middle",))
    alpha_cumprod = DDPMScheduler().alphas_cumprod[t.long()].reshape(-1, 1, 1, 1)
    expected = (x_t - (1 - alpha_cumprod).sqrt() * loaded.network(x_t, t)) / alpha_cumprod.sqrt()
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)
    assert features["middle"].shape == (2, *loaded.feature_shapes["middle"])

    student = distill("digits", output=tmp_path / "run", teacher=str(teacher), **SETTINGS)
    assert json.loads((student / "model_index.json").read_text())["_class_name"] == "OneStepPipeline"
    reloaded: Any = load_student(student)
    assert isinstance(reloaded.denoiser.network, ConvNet)
    before = loaded.state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in reloaded.denoiser.state_dict().items())
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    images = OneStepPipeline.from_pretrained(student)(
        batch_size=3, generator=torch.Generator().manual_seed(1), output_type="pt"
    ).images
    torch.testing.assert_close(images, (reloaded(noise) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert len(list(generate(student, num_images=2, output=tmp_path / "images").glob("*.png"))) == 2


def test_what_works_of_itself_for_a_new_family(registered: Family, teacher: Path, tmp_path: Path) -> None:
    """A smaller student, `fdistill inspect`, and a recipe's smoke run."""
    settings = SETTINGS | {"student.network": {"width": 16}, "iterations": 1}
    student = distill("digits", output=tmp_path / "run", teacher=str(teacher), **settings)
    smaller: Any = load_student(student)
    assert smaller.denoiser.network.config.width == 16
    facts, *_ = inspected(teacher, data="digits")
    assert facts["student"].endswith("exported as fdistill.OneStepPipeline")
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "teacher: published\ndata: published\nmethod: diff-instruct\ndiscriminator: {gan_weight: 0}\n"
        "smoke:\n  network: {_class_name: ConvNet}\n  scheduler: {_class_name: DDPMScheduler}\n"
    )
    config = smoke_config(str(recipe))
    tiny: Any = load_teacher(config.teacher)
    assert type(tiny.network) is ConvNet


def test_a_new_family_of_unets_has_its_own_names_in_comfyui(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network alone, as nothing of Stable Diffusion holds for it."""
    published = dataclasses.replace(
        FAMILY, original_layout=lambda names, config: make_layout(names, lambda name: (f"net.{name}", 0))
    )
    monkeypatch.setitem(FAMILIES, "ConvNet", published)
    (teacher / "network").rename(teacher / published.component)
    index = {"_class_name": "OwnPipeline", published.component: ["own", "ConvNet"]}
    (teacher / "model_index.json").write_text(json.dumps(index))
    tensors, notes = comfy.single_file(teacher)
    network = ConvNet.from_pretrained(teacher / published.component)
    torch.testing.assert_close(
        tensors, {f"model.diffusion_model.net.{name}": value for name, value in network.state_dict().items()}
    )
    assert notes == ["the file holds the network alone: load it with ComfyUI's Load Diffusion Model (UNETLoader)"]
    monkeypatch.setitem(FAMILIES, "ConvNet", dataclasses.replace(published, comfy_checkpoint=f"{__name__}:whole"))
    tensors, notes = comfy.single_file(teacher)
    assert "vae.decoder" in tensors
    assert "model.diffusion_model.net.first.weight" in tensors
    assert notes == ["own_checkpoint"]


def whole(folder: Path, network: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What a family's `comfy_checkpoint` names."""
    return network | {"vae.decoder": torch.zeros(1)}, ["own_checkpoint"]
