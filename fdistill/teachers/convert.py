"""Converts published checkpoints into teacher folders of config.json and safetensors, without running their code."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import Tensor

from fdistill.adapters.dit import Published
from fdistill.adapters.parametrisation import TIME_CONVENTION
from fdistill.base.errors import ArgumentError, CheckpointError, did_you_mean
from fdistill.base.files import atomic_folder, claim_folder, read_json_object, sha256_of_files
from fdistill.formats.unpickle import Record, load_restricted, state_dict
from fdistill.networks import EDM2Network, EDMNetwork
from fdistill.teachers.convert_dit import LABELS, Given, transformer_config, transformer_tensors

#: Class name in the pickle -> fdistill's network class, and the arguments of the pickled class's constructor before
#: **kwargs: names in order, with defaults.
NETWORKS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "EDMPrecond": (
        EDMNetwork,
        {
            "img_resolution": None,
            "img_channels": None,
            "label_dim": 0,
            "use_fp16": False,
            "sigma_min": 0.0,
            "sigma_max": math.inf,
            "sigma_data": 0.5,
            "model_type": "DhariwalUNet",
        },
    ),
    "Precond": (
        EDM2Network,
        {
            "img_resolution": None,
            "img_channels": None,
            "label_dim": None,
            "use_fp16": True,
            "sigma_data": 0.5,
            "logvar_channels": 128,
        },
    ),
}

#: Arguments of the constructor of EDM2's encoder, in order, with defaults. Its latents are those of the VAE, shifted
#: and scaled per channel.
LATENT_ENCODER: dict[str, Any] = {
    "vae_name": "stabilityai/sd-vae-ft-mse",
    "raw_mean": [5.81, 3.25, 0.12, -2.15],
    "raw_std": [4.17, 4.62, 3.71, 3.28],
    "final_mean": 0.0,
    "final_std": 0.5,
}

#: The levels of the published samplers, used if the network's own bounds are 0 and infinity.
LEVELS = {"sigma_min": 0.002, "sigma_max": 80.0}

FAMILIES = ("dit", "sit")

_PICKLES = (".pkl", ".pickle")
_STATE_DICTS = (".pt", ".pth", ".safetensors")


#: DiT and SiT guide the first three of four channels (`forward_with_cfg` of their published code).
_GUIDANCE_CHANNELS = 3


def convert(
    source: Path, output: Path, family: str | None = None, *, num_classes: int | None = None, heads: int | None = None
) -> Path:
    """Writes a teacher folder from a published checkpoint; nothing in the file is executed.

    Args:
        source: a network pickle of EDM or EDM2 (.pkl), or a state dict of a DiT or SiT (.pt, .pth, .safetensors).
        output: a folder that does not exist, or is empty. A pickle becomes config.json and
            diffusion_pytorch_model.safetensors in float32, a state dict becomes transformer/ and scheduler/.
        family: "dit" or "sit" for a state dict: tensors of both have the same names and shapes. None for a pickle.
        num_classes: of a state dict whose label embedding has another number of rows than ImageNet's 1,001. It is the
            number of rows, if the network was trained without class dropout, and one less if it was trained with it.
        heads: number of attention heads of a state dict of another width than the published ones.

    Returns:
        The output folder.

    Raises:
        CheckpointError: the file cannot be read, refers to code that is not on a fixed list of classes and functions,
            or holds another network.
        ArgumentError: the family is missing for a state dict; or it, num_classes or heads are given for a pickle.
        OutputError: the output exists or cannot be written.
    """
    source, suffix = Path(source), Path(source).suffix.lower()
    if suffix not in _PICKLES + _STATE_DICTS:
        raise CheckpointError(
            f"{source}: cannot tell what it is from its name; expected one of {', '.join(_PICKLES + _STATE_DICTS)}"
        )
    for name, value in {"family": family, "num_classes": num_classes, "heads": heads}.items():
        if suffix in _PICKLES and value is not None:
            raise ArgumentError(f"{name}: got {value!r} for a pickle, which says itself what it is; leave it out")
    if suffix in _STATE_DICTS and family not in FAMILIES:
        raise ArgumentError(
            f"family: got {family!r}; a state dict does not say whether it is a DiT (predicts noise) or a SiT "
            "(predicts velocity): pass 'dit' or 'sit'"
        )
    output = claim_folder(output)
    if suffix in _PICKLES:
        _convert_pickle(source, output)
    else:
        assert family is not None
        _convert_transformer(source, output, family, Given(num_classes, heads))
    return output


def _convert_pickle(source: Path, output: Path) -> None:
    content = load_restricted(source)
    record = _network(content, source)
    cls, names = NETWORKS[record.name]
    config = _settings(record, cls, names, source)
    vae = None
    if cls is EDM2Network:
        encoder = content.get("encoder") if isinstance(content, dict) else None
        vae = _latent_encoder(encoder, config, source)
    network = _filled(cls, config, state_dict(record), source)
    with atomic_folder(output) as folder:
        network.save_pretrained(folder)
        levels = f"Noise levels sigma from {config['sigma_min']:g} to {config['sigma_max']:g}; "
        space = "the network sees pixels in [-1, 1]."
        if vae is not None:
            space = f"the network sees latents of images in [0, 1]. Next: put their autoencoder {vae} into `vae/`."
        _write_card(folder, source, f"{record.name} ({_architecture(config)})", network, levels + space)


def _network(content: Any, source: Path) -> Record:
    """The averaged network that a published pickle holds under "ema"."""
    network = content.get("ema") if isinstance(content, dict) else content
    if isinstance(network, Record) and network.name in NETWORKS:
        return network
    found = network.name if isinstance(network, Record) else f"a {type(network).__name__}"
    if isinstance(content, dict) and "ema" not in content:
        found = f"a dict of {', '.join(map(repr, list(content)[:8])) or 'nothing'}"
    raise CheckpointError(
        f"{source}: holds {found}; expected a network of EDM (EDMPrecond) or EDM2 (Precond) under 'ema', as their "
        "published pickles have it"
    )


def _settings(record: Record, cls: type[Any], names: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The arguments of `cls` for the same network, from those of the pickled network's constructor."""
    given = dict(zip(names, record.arguments, strict=False)) | record.keywords
    config = {**names, **given}
    del config["use_fp16"]
    if cls is EDM2Network and config.get("resample_filter") in ([1, 1], (1, 1)):
        del config["resample_filter"]  # the only one that EDM2Network has
    known = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    for name, value in config.items():
        if name not in known:
            raise CheckpointError(
                f"{source}: {record.name} has a setting {name!r} that is not supported; {did_you_mean(name, known)}"
            )
        if not _is_plain(value):
            raise CheckpointError(
                f"{source}: setting {name} is a {type(value).__name__}; expected numbers or text, or a list of them"
            )
    for name, bound in LEVELS.items():
        value = config.get(name)
        config[name] = value if isinstance(value, (int, float)) and 0 < value < math.inf else bound
    return config


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return len(values) < 100 and all(isinstance(inner, (str, int, float, type(None))) for inner in values)


def _latent_encoder(encoder: Any, config: dict[str, Any], source: Path) -> str | None:
    """Adds the scale and bias of a latent network to its config; returns the name of its VAE, None for pixels."""
    name = encoder.name if isinstance(encoder, Record) else None
    if name == "StandardRGBEncoder" or (name is None and config["img_channels"] != 4):
        return None
    if name not in (None, "StabilityVAEEncoder"):
        raise CheckpointError(f"{source}: encoder {name} is not supported; expected StabilityVAEEncoder")
    settings = dict(LATENT_ENCODER)
    if name is not None:
        settings |= dict(zip(settings, encoder.arguments, strict=False)) | encoder.keywords
    try:
        scale = [settings["final_std"] / std for std in settings["raw_std"]]
        bias = [
            settings["final_mean"] - mean * factor for mean, factor in zip(settings["raw_mean"], scale, strict=True)
        ]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{source}: encoder {name} is made from {settings}; expected numbers") from error
    # StabilityVAEEncoder gives the autoencoder pixels / 255, and clamps what it decodes to [0, 1].
    config |= {"latent_scale": scale, "latent_bias": bias, "pixel_range": [0.0, 1.0]}
    return str(settings["vae_name"])


def _filled(cls: type[Any], config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Path) -> Any:
    """A network with exactly these tensors, in float32."""
    try:
        with torch.device("meta"):
            network = cls(**config)
    except (ArgumentError, TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(
            f"{source}: no {cls.__name__} can be built from its settings ({' '.join(str(error).split())[:300]})"
        ) from error
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{source}: tensor {name} is missing; expected one of shape {shape}")
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{source}: tensor {name} has shape {tuple(tensors[name].shape)}; expected {shape}")
    for name in tensors:
        if name not in expected:
            raise CheckpointError(f"{source}: tensor {name} has no place in a {cls.__name__} of its settings")
    copies = {name: torch.empty(shape).copy_(tensors[name]) for name, shape in expected.items()}
    network.load_state_dict(copies, assign=True)
    return network


def _convert_transformer(source: Path, output: Path, family: str, given: Given) -> None:
    tensors = _read_state_dict(source)
    config = transformer_config(tensors, given, source)
    renamed = transformer_tensors(tensors, config, source)
    has_null_class = len(tensors[LABELS]) > config["num_embeds_ada_norm"]
    network = _filled(DiTTransformer2DModel, config, renamed, source)
    scheduler: Any
    if family == "dit":
        scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
        note = "Predicts noise at timesteps 0 ... 999 of a linear beta schedule."
    else:
        scheduler = FlowMatchEulerDiscreteScheduler()
        note = "Predicts the velocity data - noise, and takes t from 0 (noise) to 1 (data) as input."
    classes = f"{config['num_embeds_ada_norm']:,} classes"
    note += f" It has {classes} and {'a' if has_null_class else 'no'} label for `no class`."
    note += (
        " The network sees latents of a VAE, which the file does not hold. Next: put stabilityai/sd-vae-ft-ema (or "
        "sd-vae-ft-mse, whichever the checkpoint was trained with) into `vae/`."
    )
    with atomic_folder(output) as folder:
        network.save_pretrained(folder / "transformer")
        scheduler.save_pretrained(folder / "scheduler")
        path = folder / "scheduler" / "scheduler_config.json"
        published = Published(
            0, _GUIDANCE_CHANNELS if config["in_channels"] > _GUIDANCE_CHANNELS else None, has_null_class
        )
        extra = published.keys() | ({TIME_CONVENTION: "sit"} if family == "sit" else {})
        path.write_text(json.dumps(read_json_object(path) | extra, indent=2) + "\n", encoding="utf-8")
        kind = f"{'DiT' if family == 'dit' else 'SiT'} with {config['num_layers']} blocks"
        _write_card(folder, source, f"{kind}, patches of {config['patch_size']}", network, note)


def _read_state_dict(source: Path) -> dict[str, Tensor]:
    """Tensors of a .pt file (flat, or under "ema" or "model") or a safetensors file."""
    try:
        if source.suffix.lower() == ".safetensors":
            return dict(load_file(source))
        # Training checkpoints hold their command line in a Namespace, a class that only stores values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises nearly any exception on damaged bytes
        reason = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
        named = re.search(r"GLOBAL (\S+)", reason)
        raise CheckpointError(
            f"{source}: refused {named[1]}, which no state dict needs; no code was run; expected tensors alone"
            if named
            else f"{source}: cannot be read ({reason[:200] or type(error).__name__}); expected a file of tensors"
        ) from error
    for key in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(
            f"{source}: holds no state dict; expected a dict of tensors by name, or one under 'ema' or 'model'"
        )
    return content


def _architecture(config: Mapping[str, Any]) -> str:
    size, channels = config["img_resolution"], config["img_channels"]
    classes = f"{config['label_dim']} classes" if config["label_dim"] else "unconditional"
    return f"{size}x{size}, {channels} channels, {classes}"


def _write_card(folder: Path, source: Path, what: str, network: ModelMixin, note: str) -> None:
    count = sum(parameter.numel() for parameter in network.parameters())
    (folder / "README.md").write_text(
        f"# {source.stem}\n\n{what}, {count:,} parameters in float32.\n\n{note}\n\n"
        f"Converted by `fdistill convert` from `{source.name}`, sha256\n`{sha256_of_files([source])}`. "
        "The licence is that of the source.\n\n"
        "Distil it with `fdistill distill CONFIG teacher=THIS_FOLDER --output RUN`.\n",
        encoding="utf-8",
    )
