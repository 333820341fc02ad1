"""HPSv2.1 and PickScore (`fdistill.preference`) as feature networks: an image's features times its prompt's are the
score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from evaluation.extractors.clip import ClipModel
from evaluation.extractors.extractor import Extractor, full_precision, prepare_each, runner
from evaluation.weights import PUBLISHED, Weights, find_weights, is_published
from fdistill.base.files import sha256_of_files
from fdistill.preference.models import MODELS, padded


def open_hps(name: str, device: torch.device, weights: Weights) -> ClipModel:
    """HPSv2.1 ("hps21"). The features' product is 100 times the cosine, as its benchmark reports it.

    An image is scaled in float so that its longer side fits, and padded with black, which for square images is all.

    Raises:
        CheckpointError: its weights are not found, are unreadable, or are of another architecture.
    """
    preparation = "bicubic with antialiasing, the longer side to {}, padded with black; CLIP's mean and deviation"
    return _open(name, device, weights, preparation, _padded)


def open_pickscore(name: str, device: torch.device, weights: Weights) -> ClipModel:
    """PickScore v1 ("pickscore"). The features' product is exp(logit_scale) times the cosine, about 20 to 23.

    An image is resized as CLIP does it: its shorter side fits, bicubic, and the centre is cut out.

    Raises:
        CheckpointError: as `open_hps`.
    """
    preparation = "Pillow's bicubic, the shorter side to {}, its centre; CLIP's mean and deviation"
    return _open(name, device, weights, preparation, _cropped)


def _open(
    name: str,
    device: torch.device,
    weights: Weights,
    preparation: str,
    fitted: Callable[[int], Callable[[NDArray[Any]], Tensor]],
) -> ClipModel:
    """A `ClipModel` whose image features times text features are the score.

    Args:
        preparation: in words, with {} for the size of the network's inputs.
        fitted: that size -> a function of an image as uint8 [H, W, 3] -> [3, size, size] in [0, 1].
    """
    path = find_weights(name, PUBLISHED[name], weights)
    model = MODELS[name].load(path).to(device)
    fit = fitted(model.size)

    def compute(images: Tensor) -> dict[str, Tensor]:
        return {"image": model.encode_fitted(prepare_each(images, fit).to(device))}

    def encode_prompts(prompts: Sequence[str], prefix: str = "") -> Tensor:
        with full_precision(device):
            return model.encode_prompts([prefix + prompt for prompt in prompts]).to("cpu", torch.float32)

    sha256 = sha256_of_files([path])
    published = is_published(path, sha256, PUBLISHED[name])
    with torch.no_grad():
        width = model.encode_fitted(torch.zeros(1, 3, model.size, model.size, device=device)).shape[1]
    run = runner(compute, device)
    extractor = Extractor(name, {"image": width}, run, preparation.format(model.size), sha256, published)
    return ClipModel(extractor, encode_prompts)


def _padded(size: int) -> Callable[[NDArray[Any]], Tensor]:
    def fit(image: NDArray[Any]) -> Tensor:
        return padded(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255, size)[0]

    return fit


def _cropped(size: int) -> Callable[[NDArray[Any]], Tensor]:
    """CLIP's own transform, without its last step, the normalisation."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    steps = image_transform_v2(PreprocessCfg(size=size), is_train=False).transforms[:-1]

    def fit(image: NDArray[Any]) -> Tensor:
        fitted: Any = Image.fromarray(image)
        for step in steps:
            fitted = step(fitted)
        found: Tensor = fitted
        return found

    return fit
