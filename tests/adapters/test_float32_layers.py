"""The last layer of networks that predict eps computes in float32; nothing else about them changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fdistill import load_teacher
from fdistill.adapters.float32_layers import Float32Conv2d, Float32Linear
from fdistill.adapters.resize import resized
from fdistill.denoiser import Denoiser
from fdistill.students.lora import lora_copy, merged
from fdistill.training.activation_checkpointing import checkpoint_activations
from support.families import FAMILIES
from support.text_families import TEXT_FAMILIES
from support.text_families_dit import TEXT_FAMILIES_DIT

WRITERS: dict[str, Callable[[Path], Path]] = {
    name: family[0] for families in (FAMILIES, TEXT_FAMILIES, TEXT_FAMILIES_DIT) for name, family in families.items()
}
LAST = {
    "ddpm": "conv_out",
    "learned-variance": "conv_out",
    "dit": "proj_out_2",
    "sd15": "conv_out",
    "pixart": "proj_out",
}
#: Nothing amplifies what they predict: x0, v, EDM's output and the velocity of a flow.
PLAIN = ("ddpm-x0", "ddpm-v", "consistency", "flow", "sit", "sd21v")
CLASSES = {Float32Conv2d: nn.Conv2d, Float32Linear: nn.Linear}

amplified = pytest.mark.parametrize("name", LAST)


def loaded(name: str, folder: Path) -> Denoiser:
    return load_teacher(WRITERS[name](folder / "teacher"))


def last_layer(denoiser: Denoiser, name: str) -> nn.Module:
    layer: nn.Module = denoiser.network.get_submodule(LAST[name])
    return layer


def output(denoiser: Denoiser, *, bf16: bool, level: float = 0.9) -> Tensor:
    torch.manual_seed(3)
    x_t = torch.randn(4, *denoiser.sample_shape)
    t = torch.full((4,), level * denoiser.schedule.t_max)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        fed = denoiser.network_input(x_t, t)
        return denoiser.predict(fed, t, denoiser.example_condition(4, "cpu"))[0].output


@amplified
def test_the_output_is_not_rounded(name: str, tmp_path: Path) -> None:
    """Neither in autocast nor with weights in bf16; what the last layer reads still is."""
    denoiser = loaded(name, tmp_path)
    for evaluated in (denoiser, copy.deepcopy(denoiser).to(torch.bfloat16)):
        layer = last_layer(evaluated, name)
        seen: list[tuple[Tensor, Tensor]] = []
        handle = layer.register_forward_hook(lambda _, inputs, result, seen=seen: seen.append((inputs[0], result)))
        assert output(evaluated, bf16=True).dtype == torch.float32
        handle.remove()
        ((read, result),) = seen
        plain = copy.deepcopy(layer).float()
        plain.__class__ = CLASSES[type(layer)]
        with torch.no_grad():
            torch.testing.assert_close(result, plain(read.float()))
        assert not torch.equal(result, result.bfloat16().float())


@amplified
def test_in_float32_every_bit_is_as_before(name: str, tmp_path: Path) -> None:
    denoiser = loaded(name, tmp_path)
    after, layer = output(denoiser, bf16=False), last_layer(denoiser, name)
    layer.__class__ = CLASSES[type(layer)]
    assert torch.equal(output(denoiser, bf16=False), after)


@pytest.mark.parametrize("name", PLAIN)
def test_networks_that_predict_something_else_stay_as_they_are(name: str, tmp_path: Path) -> None:
    denoiser = loaded(name, tmp_path)
    assert not any(isinstance(module, tuple(CLASSES)) for module in denoiser.modules())


@amplified
def test_copies_adapters_and_checkpointing_keep_it(name: str, tmp_path: Path) -> None:
    denoiser = loaded(name, tmp_path)
    kind = type(last_layer(denoiser, name))
    assert type(last_layer(copy.deepcopy(denoiser), name)) is kind
    adapted = lora_copy(denoiser, 2, targets=[LAST[name]])
    torch.testing.assert_close(output(adapted, bf16=True), output(denoiser, bf16=True), rtol=1e-6, atol=1e-6)
    assert output(adapted, bf16=True).dtype == torch.float32
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    plain = merged(adapted)
    assert type(last_layer(plain, name)) is kind
    torch.testing.assert_close(output(plain, bf16=False), output(adapted, bf16=False), rtol=1e-4, atol=1e-4)
    checkpoint_activations(denoiser)
    assert output(denoiser, bf16=True).dtype == torch.float32


@pytest.mark.parametrize("name", ["ddpm", "dit", "sd15"])
def test_smaller_students_have_it(name: str, tmp_path: Path) -> None:
    denoiser = loaded(name, tmp_path)
    changes = {"num_layers": 2} if name == "dit" else {"layers_per_block": 2}
    smaller = resized(denoiser, changes).denoiser
    assert isinstance(last_layer(smaller, name), tuple(CLASSES))


@amplified
def test_saved_networks_are_their_library_s_own(name: str, tmp_path: Path) -> None:
    denoiser = loaded(name, tmp_path)
    denoiser.network.save_pretrained(tmp_path / "saved")
    plain = type(denoiser.network).from_pretrained(tmp_path / "saved")
    assert type(plain.get_submodule(LAST[name])) in CLASSES.values()
    assert plain.state_dict().keys() == denoiser.network.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, denoiser.network.state_dict()[key]), key


@pytest.mark.parametrize("kind", CLASSES)
def test_it_compiles_as_one_graph(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer, x = (nn.Conv2d(3, 2, 3, padding=1), torch.randn(2, 3, 4, 4))
    if kind is Float32Linear:
        layer, x = nn.Linear(3, 2), torch.randn(2, 3)  # type: ignore[assignment]
    layer.__class__ = kind  # type: ignore[assignment]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = compiled(x.bfloat16()), layer(x.bfloat16())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert layer.weight.grad is not None
