"""CLIP (arXiv 2103.00020) by open_clip: features of images, and of prompts to compare them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from evaluation.extractors.extractor import Extractor, full_precision, prepare_each, runner
from evaluation.weights import PUBLISHED, Weights, find_weights, is_published
from fdistill.assets import CLIP_DIGITS
from fdistill.base.errors import ArgumentError, CheckpointError, brief, did_you_mean
from fdistill.base.files import read_json_object, sha256_of_files
from fdistill.base.torch_files import read_state_dict

#: (architecture, tag) in open_clip of the networks in `PUBLISHED`. OpenAI's were trained with QuickGELU.
ARCHITECTURES = {
    "clip-b32": ("ViT-B-32-quickgelu", "openai"),
    "clip-l14": ("ViT-L-14-quickgelu", "openai"),
    "clip-g14": ("ViT-g-14", "laion2b_s12b_b42k"),
}
#: All models; "clip" is the user's own open_clip folder, --weights clip=FOLDER.
CLIP_MODELS = (*ARCHITECTURES, "clip-digits", "clip")

_WEIGHTS, _CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


@dataclass(frozen=True)
class ClipModel:
    """The image encoder and the text encoder of a CLIP model. Their features are not normalised.

    Attributes:
        extractor: the image encoder, with output "image" [B, D].
        encode_prompts: (prompts, prefix="") -> float32 [N, D] on the CPU, the features of prefix + prompt, in one
            batch. Texts that are too long for the model are cut, and keep their end-of-text token.
    """

    extractor: Extractor
    encode_prompts: Callable[..., Tensor]


def open_clip_model(name: str, device: torch.device, weights: Weights) -> ClipModel:
    """Opens one of `CLIP_MODELS` on a device. weights[name] may be an open_clip folder, for a published model too.

    Raises:
        ArgumentError: an unknown name.
        CheckpointError: its weights are not found, are unreadable, or are of another architecture.
    """
    if name not in CLIP_MODELS:
        raise ArgumentError(f"CLIP model {name!r}: {did_you_mean(name, CLIP_MODELS)}")
    folder = CLIP_DIGITS if name == "clip-digits" else weights.get(name)
    if folder is not None and (folder / _CONFIG).is_file():
        model, tokenizer, transform = load_clip_folder(folder)
        path = folder / _WEIGHTS
    elif name in ARCHITECTURES:
        path = find_weights(name, PUBLISHED[name], weights)
        model, tokenizer, transform = _load_published(*ARCHITECTURES[name], path)
    else:
        wanted = f"no {_CONFIG} in {folder}" if folder else "no folder is given for it"
        raise CheckpointError(f"{name}: {wanted}; pass --weights clip=FOLDER with {_CONFIG} and {_WEIGHTS} in it")
    sha256 = sha256_of_files([path])
    published = name == "clip-digits" or (name in PUBLISHED and is_published(path, sha256, PUBLISHED[name]))
    return _clip_model(name, model.to(device), tokenizer, transform, device, sha256, published)


def load_clip_folder(folder: Path) -> tuple[nn.Module, Any, Callable[[Image.Image], Tensor]]:
    """Loads a CLIP model from a folder as open_clip's `push_to_hf_hub` writes it.

    It reads open_clip_config.json (model_cfg with embed_dim, vision_cfg and text_cfg; preprocess_cfg) and the weights
    open_clip_model.safetensors. If text_cfg has any hf_tokenizer_name, it reads the tokenizer's own files in the folder
    (tokenizer.json, tokenizer_config.json); otherwise the tokenizer is CLIP's.

    Returns:
        (model in float32 and eval mode on the CPU, tokenizer: texts -> tokens [B, L], transform: PIL image ->
        [3, H, W]).

    Raises:
        CheckpointError: a file is missing or damaged, or the model is not made of open_clip's own transformers.
    """
    import open_clip

    try:
        config = read_json_object(folder / _CONFIG)
        model_config, preprocessing = dict(config["model_cfg"]), dict(config.get("preprocess_cfg", {}))
        vision, text = dict(model_config["vision_cfg"]), dict(model_config["text_cfg"])
        if vision.get("timm_model_name") or text.get("hf_model_name"):
            raise ValueError("timm_model_name and hf_model_name are networks of other libraries, which are not read")
        model = _build(model_config, folder / _WEIGHTS)
        length = int(text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH))
        tokenizer: Any = open_clip.SimpleTokenizer(context_length=length)
        if text.get("hf_tokenizer_name"):
            tokenizer = open_clip.tokenizer.HFTokenizer(
                str(folder),
                context_length=length,
                tokenizer_mode=text.get("tokenizer_mode"),
                trust_remote_code=False,
                local_files_only=True,
                **(text.get("tokenizer_kwargs") or {}),
            )
        return model, tokenizer, _transform(model, preprocessing)
    except (OSError, ValueError, TypeError, LookupError, AssertionError, ImportError) as error:
        raise CheckpointError(
            f"{folder}: cannot be loaded as a CLIP model ({brief(error)}); "
            f"expected {_CONFIG}, {_WEIGHTS} and the tokenizer's files, as open_clip writes them"
        ) from error


def _load_published(architecture: str, tag: str, path: Path) -> tuple[nn.Module, Any, Callable[[Image.Image], Tensor]]:
    import open_clip

    model = _build(open_clip.get_model_config(architecture), path)
    transform = _transform(model, open_clip.get_pretrained_cfg(architecture, tag))
    return model, open_clip.get_tokenizer(architecture), transform


def _build(config: dict[str, Any], path: Path) -> nn.Module:
    """The model of a configuration (model_cfg in open_clip), with the weights of a file."""
    import open_clip

    model: nn.Module = open_clip.CLIP(**config)
    state = read_state_dict(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: is of another architecture ({brief(error)}); expected open_clip's weights "
            f"of width {config['embed_dim']}"
        ) from error
    return model.float().eval().requires_grad_(False)


def _transform(model: Any, config: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """open_clip's own transform of images for a model."""
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    settings = merge_preprocess_dict(PreprocessCfg(), config) | {"size": model.visual.image_size}
    transform: Callable[[Image.Image], Tensor] = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    return transform


def _clip_model(
    name: str,
    model: Any,
    tokenizer: Any,
    transform: Callable[[Image.Image], Tensor],
    device: torch.device,
    sha256: str,
    published: bool,
) -> ClipModel:
    def prepare(image: NDArray[Any]) -> Tensor:
        return transform(Image.fromarray(image))

    def compute(images: Tensor) -> dict[str, Tensor]:
        return {"image": model.encode_image(prepare_each(images, prepare).to(device))}

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str], prefix: str = "") -> Tensor:
        tokens = tokenizer([prefix + prompt for prompt in prompts])
        with full_precision(device):
            features: Tensor = model.encode_text(tokens.to(device))
        return features.to("cpu", torch.float32)

    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    preparation = f"open_clip's transform to {height}x{width}: {' '.join(str(transform).split())}"
    with torch.no_grad():
        features = model.encode_image(torch.zeros(1, 3, height, width, device=device))
    outputs = {"image": features.shape[1]}
    return ClipModel(Extractor(name, outputs, runner(compute, device), preparation, sha256, published), encode_prompts)
