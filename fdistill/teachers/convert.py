"""Converts published checkpoints into folders of config.json and safetensors, without running their code."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from fdistill.adapters.checkpoint import Checkpoint, find_network, resolve_checkpoint
from fdistill.adapters.dit import Published
from fdistill.adapters.parametrisation import TIME_CONVENTION
from fdistill.base.errors import ArgumentError, CheckpointError, did_you_mean
from fdistill.base.files import atomic_folder, claimed_folder, not_weights, read_json_object, sha256_of_files
from fdistill.formats.state_file import as_safetensors, read_state_file
from fdistill.formats.unpickle import Record, load_restricted, state_dict
from fdistill.networks import EDM2Network, EDMNetwork
from fdistill.teachers.convert_dit import (
    LABELS,
    NOTHING,
    Given,
    published_names,
    transformer_config,
    transformer_tensors,
    what_training_says,
)
from fdistill.teachers.convert_like import folder_of, network_like, write_like
from fdistill.teachers.fitting import filled
from fdistill.teachers.teacher import copy_single_file

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
_STATE_DICTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

#: Where published students start, by those who trained them.
STUDENT_LEVELS = (
    "80 for EDM students of DMD2 and FastGen, 2.5 for SiD's; 999 for Stable Diffusion 1.5; 399 for DMD2's SDXL of one "
    "step, 999,749,499,249 for that of four; none, if this is a teacher"
)

#: DiT and SiT guide the first three of four channels (`forward_with_cfg` of their published code).
_GUIDANCE_CHANNELS = 3


@dataclass(frozen=True)
class Elsewhere:
    """What the caller knows of a network that others trained, and its file does not say.

    Attributes:
        like: a checkpoint of the same architecture, which also gives whatever stands beside a network, such as an
            autoencoder; anything that `resolve_checkpoint` takes.
        base: the published pipeline that a text-to-image network was trained from.
        weights: which network of the file, as "net" or "ema_9999".
        student: whether it is a student; None if nobody has said.
    """

    like: str | None = None
    base: str | None = None
    weights: str | None = None
    student: bool | None = None


def convert(
    source: Path,
    output: Path,
    family: str | None = None,
    *,
    given: Given = NOTHING,
    elsewhere: Elsewhere = Elsewhere(),
) -> Path:
    """Writes a teacher folder from a published checkpoint; nothing in the file is executed.

    Args:
        source: a network pickle of EDM, EDM2 or SiD (.pkl), or a state dict (.pt, .pth, .bin, .ckpt, .safetensors).
        output: a folder that does not exist, or is empty. A pickle becomes config.json and
            diffusion_pytorch_model.safetensors in float32, a state dict of a DiT or SiT becomes transformer/ and
            scheduler/, any other state dict a folder like the one that `elsewhere` names.
        family: "dit" or "sit" for their state dicts: tensors of both have the same names and shapes.
        given: what the tensors of a DiT or SiT do not say.
        elsewhere: what else the file does not say.

    Returns:
        The output folder.

    Raises:
        CheckpointError: the file cannot be read, refers to code that is not on a fixed list of classes and functions,
            or holds another network.
        ArgumentError: the caller has to say more, or says what does not apply; the message names it.
        OutputError: the output exists or cannot be written.
    """
    source, suffix = Path(source), Path(source).suffix.lower()
    what = not_weights(source)
    if what is not None:
        raise CheckpointError(f"{source}: {what}")
    if suffix not in _PICKLES + _STATE_DICTS:
        raise CheckpointError(
            f"{source}: cannot tell what it is from its name; expected one of {', '.join(_PICKLES + _STATE_DICTS)}"
        )
    for name, value in {"family": family, **given._asdict()}.items():
        if suffix in _PICKLES and value is not None:
            raise ArgumentError(f"{name}: got {value!r} for a pickle, which says itself what it is; leave it out")
    if family not in (None, *FAMILIES):
        raise ArgumentError(f"family: got {family!r}; {did_you_mean(family, FAMILIES)}")
    named = [name for name in ("like", "base") if getattr(elsewhere, name) is not None]
    if len(named) == 2 or (named and family is not None):
        raise ArgumentError(f"{named[-1]}: got two descriptions of one network; expected one of like, base and family")
    with claimed_folder(output) as folder:
        if elsewhere.base is not None:
            if suffix != ".safetensors":
                _check_said(elsewhere, source, "a network trained from this base may be either")
            copy_single_file(as_safetensors(source, elsewhere.weights), elsewhere.base, folder)
        elif suffix in _PICKLES:
            _convert_pickle(source, folder, elsewhere)
        else:
            _convert_state_dict(source, folder, family, given, elsewhere)
    return folder


def _check_said(elsewhere: Elsewhere, source: Path, why: str) -> None:
    """Raises ArgumentError if nobody has said whether it is a teacher or a student."""
    if elsewhere.student is None:
        raise ArgumentError(f"student_level: {source} does not say whether it is a student ({why}): {STUDENT_LEVELS}")


def _like(elsewhere: Elsewhere) -> Checkpoint | None:
    return None if elsewhere.like is None else resolve_checkpoint(elsewhere.like)


def _convert_pickle(source: Path, output: Path, elsewhere: Elsewhere) -> None:
    content = load_restricted(source)
    record = _network(content, source)
    if isinstance(content, dict) and content.keys() == {"ema"}:  # EDM's own snapshots hold their loss and data too
        _check_said(elsewhere, source, "it holds a network under 'ema' and nothing else, as SiD writes its students")
    like = _like(elsewhere)
    cls, names = NETWORKS[record.name]
    space, what = "the network sees pixels in [-1, 1].", f"{record.name} like {elsewhere.like}"
    if record.arguments or record.keywords:
        config = _settings(record, cls, names, source)
        vae = None
        if cls is EDM2Network:
            encoder = content.get("encoder") if isinstance(content, dict) else None
            vae = _latent_encoder(encoder, config, source)
        network = filled(cls, config, state_dict(record), source)
        what = f"{record.name} ({_architecture(config)})"
        if vae is not None:
            space = f"the network sees latents of images in [0, 1]. Next: put their autoencoder {vae} into `vae/`."
    elif like is not None:
        network = network_like(state_dict(record), like, source)
    else:
        raise ArgumentError(
            f"like: {source} holds an {record.name} without the settings that it was made from; expected a checkpoint "
            "of the same architecture, as the converted pickle of its teacher"
        )
    config = network.config
    levels = ""  # where the network is one of diffusers, its scheduler says them
    if "sigma_min" in config:
        levels = f"Noise levels sigma from {config.sigma_min:g} to {config.sigma_max:g}; "
    with atomic_folder(output) as folder:
        if like is None:
            network.save_pretrained(folder)
        else:
            write_like(network, like, folder)
        _write_card(folder, source, what, network, levels + space)


def _convert_state_dict(source: Path, output: Path, family: str | None, given: Given, elsewhere: Elsewhere) -> None:
    file = read_state_file(source, elsewhere.weights)
    if file.of_training:
        _check_said(elsewhere, source, "it holds a fake score too, so its network is one")
    tensors = published_names(file.tensors)
    if family is not None:
        given = what_training_says(file.arguments, family, given, source)
        _convert_transformer(tensors, source, output, family, given)
        return
    like = _like(elsewhere)
    if like is None:
        raise _unsaid(tensors, source)
    if source.suffix.lower() != ".safetensors":
        _check_said(elsewhere, source, "tensors of both have the same names")
    if find_network(folder_of(like))[0].text is not None:
        raise ArgumentError(f"like: {elsewhere.like!r} is a text-to-image pipeline; pass it as base")
    network = network_like(tensors, like, source)
    with atomic_folder(output) as folder:
        write_like(network, like, folder)
        what = f"{type(network).__name__} of the architecture of {elsewhere.like}"
        note = f"Weights `{file.name}` of the file. " if file.name else ""
        _write_card(folder, source, what, network, note + "Levels and prediction are those of that checkpoint.")


def _unsaid(tensors: Mapping[str, Tensor], source: Path) -> ArgumentError:
    """The error for a state dict of which nobody has said what it is: what its tensors show, and what to pass."""

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in tensors)

    if LABELS in tensors:
        return ArgumentError(
            f"family: {source} has the tensors of a DiT (predicts noise) or a SiT (predicts velocity), and does not "
            "say which: pass 'dit' or 'sit'"
        )
    if has("model.map_layer0.", "unet.emb_noise."):
        kind = "EDM" if has("model.map_layer0.") else "EDM2"
        return ArgumentError(
            f"like: {source} has the tensors of an {kind} network, and does not say its settings: pass the folder of a "
            "checkpoint of the same architecture, as its teacher's pickle converted by `fdistill convert`; and "
            f"student_level: {STUDENT_LEVELS}"
        )
    if has("down_blocks.", "transformer_blocks.", "model.diffusion_model.", "input_blocks."):
        return ArgumentError(
            f"base: {source} has the tensors of a network of diffusers or Stable Diffusion: pass as base the pipeline "
            "that it was trained from, if it takes prompts (stable-diffusion-v1-5/stable-diffusion-v1-5, "
            "stabilityai/stable-diffusion-xl-base-1.0), or as like a checkpoint of the same architecture; and "
            f"student_level: {STUDENT_LEVELS}"
        )
    return ArgumentError(
        f"family: the tensors of {source}, such as {next(iter(tensors))!r}, are of no known network; for a DiT or SiT "
        "pass 'dit' or 'sit', for any other network a checkpoint of the same architecture as like"
    )


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
        unknown = settings.keys() - LATENT_ENCODER.keys() - {"batch_size"}
        if unknown:
            raise CheckpointError(
                f"{source}: encoder {name} has a setting {min(unknown)!r} that is not known; expected "
                f"{', '.join(LATENT_ENCODER)}"
            )
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


def _convert_transformer(tensors: Mapping[str, Tensor], source: Path, output: Path, family: str, given: Given) -> None:
    config = transformer_config(tensors, given, source)
    renamed = transformer_tensors(tensors, config, source)
    has_null_class = len(tensors[LABELS]) > config["num_embeds_ada_norm"]
    network = filled(DiTTransformer2DModel, config, renamed, source)
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
