"""Base classes for the denoisers of diffusers' text-to-image networks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from fdistill.adapters.config_fields import check_network
from fdistill.adapters.parametrisation import Parametrisation
from fdistill.adapters.taps import run_tapped
from fdistill.adapters.variances import without_dropout
from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition, TextCondition
from fdistill.denoiser import Denoiser, Features
from fdistill.prediction import Preconditioning

_DEPTHS = (25, 50, 75, 99)  # per cent of the depth, where other implementations put discriminator heads


def as_prompts(condition: Condition | None) -> TextCondition:
    """Returns the condition if it holds prompts; raises ArgumentError otherwise."""
    if not isinstance(condition, TextCondition):
        got = "None" if condition is None else "labels"
        raise ArgumentError(f"condition: got {got}; this network wants a TextCondition, as PromptEncoder returns")
    return condition


class TextDenoiser(Denoiser):
    """A network that takes prompts, and its parametrisation.

    Args:
        network: a network of diffusers, whose own forward is called.
        parametrisation: the network's inputs at a level, and the meaning of its output.
        channels: number of channels of its latents.
        size: height and width of its latents; `resize` changes it.
        text_shapes: name -> shape, for one prompt, of each tensor that the family's `encode_prompts` returns.
    """

    text_shapes: dict[str, tuple[int, ...]]
    parametrisation: Parametrisation

    def __init__(
        self,
        network: nn.Module,
        parametrisation: Parametrisation,
        *,
        channels: int,
        size: int,
        text_shapes: dict[str, tuple[int, ...]],
    ):
        super().__init__()
        check_network(network)
        self.network = without_dropout(network)
        self.parametrisation = parametrisation
        self.schedule = parametrisation.schedule
        self.sigma_data = parametrisation.sigma_data
        self.kind = parametrisation.kind
        self.loss_weighting = parametrisation.loss_weighting
        self.num_classes = None
        self.text_shapes = text_shapes
        self.sample_shape = (channels, size, size)
        self.feature_shapes = self._feature_shapes(size, size)

    def with_network(self, network: nn.Module) -> TextDenoiser:
        """A denoiser of another network of this class, with the same parametrisation and size of latents."""
        # The constructors of subclasses take a network and its parametrisation.
        other = type(self)(network, self.parametrisation)  # type: ignore[call-arg]
        other.resize(*self.sample_shape[1:])
        return other

    def resize(self, height: int, width: int) -> None:
        """Sets the height and width of latents."""
        self.feature_shapes = self._feature_shapes(height, width)
        self.sample_shape = (self.sample_shape[0], height, width)

    @abstractmethod
    def _feature_shapes(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """Name of a feature -> its shape (C, H, W), for latents of this size."""

    @abstractmethod
    def _taps(self) -> dict[str, nn.Module]:
        """Name of a feature -> the module whose output it is, for every name in `feature_shapes`."""

    @abstractmethod
    def _read(self, name: str, result: Any) -> Tensor:
        """The feature [B, C, H, W], extracted from the output of its module."""

    @abstractmethod
    def _call(self, network_input: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
        """Calls the network's own forward: latents [B, C, H, W] and timesteps [B] -> output [B, C, H, W]."""

    def preconditioning(self, t: Tensor) -> Preconditioning:
        return self.parametrisation.preconditioning(t)

    def run(
        self,
        network_input: Tensor,
        t: Tensor,
        condition: Condition | None,
        features: Sequence[str],
        *,
        output: bool,
        output_grad: bool,
    ) -> tuple[Tensor | None, Features]:
        text, timestep = as_prompts(condition), self.parametrisation.timestep(t)
        return run_tapped(
            lambda: self._call(network_input, timestep, text),
            self._taps(),
            self._read,
            features,
            output=output,
            output_grad=output_grad,
        )

    def _cast(self, value: Tensor) -> Tensor:
        """Casts a floating-point tensor of a condition to the network's dtype; leaves other tensors unchanged."""
        return value.to(next(self.network.parameters()).dtype) if value.is_floating_point() else value


class TokenDenoiser(TextDenoiser):
    """A transformer over patches of latents.

    Features, all as images with one pixel per image token: "block0", "block1", ..., and "depth25", "depth50", "depth75"
    and "depth99", the blocks at that percentage of the depth.
    """

    #: Side of the patches, if this class cuts them; None if the network does, with the side in its config.
    patch: int | None = None

    def _blocks(self) -> Sequence[nn.Module]:
        network: Any = self.network
        return list(network.transformer_blocks)

    def _width(self) -> int:
        """Number of channels of a token."""
        config: Any = self.network.config
        return int(config.num_attention_heads * config.attention_head_dim)

    def _most_tokens(self) -> int | None:
        """The longest side, in tokens, for which the network has positions; None if there is no limit."""
        config: Any = self.network.config
        return getattr(config, "pos_embed_max_size", None)

    def _feature_shapes(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        config: Any = self.network.config
        patch = self.patch or config.patch_size
        most = self._most_tokens()
        if any(side % patch or side < patch or (most is not None and side > patch * most) for side in (height, width)):
            limit = "" if most is None else f" up to {patch * most}, the largest size with position embeddings"
            raise ArgumentError(
                f"latents of {height} x {width}: expected multiples of {patch}{limit}; patches of "
                f"{type(self.network).__name__} have that side"
            )
        return dict.fromkeys(self._taps(), (self._width(), height // patch, width // patch))

    def _taps(self) -> dict[str, nn.Module]:
        blocks = self._blocks()
        taps = {f"block{i}": block for i, block in enumerate(blocks)}
        return taps | {f"depth{share}": blocks[min(len(blocks) - 1, len(blocks) * share // 100)] for share in _DEPTHS}

    def _read(self, name: str, result: Any) -> Tensor:
        _, height, width = self.feature_shapes[name]
        # Blocks that also carry text return (text, image); those of older diffusers return both in one tensor.
        tokens = result if isinstance(result, Tensor) else result[1]
        return rearrange(tokens[:, -height * width :], "b (h w) c -> b c h w", h=height)
