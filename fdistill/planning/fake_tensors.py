"""Tensors without values (torch's FakeTensorMode), and what operations on them would take: bytes alive, and operations.

What is not seen: workspaces of convolutions, and what an allocator keeps in reserve.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fdistill.adapters import quantised_layers

_ATEN = torch.ops.aten


class Live(TorchDispatchMode):
    """Counts the storages that operations make inside the block, from their making to their end, and the operations.

    Attributes:
        now: bytes of those that are there.
        peak: the most that there were.
        flops: floating-point operations of matrix products, convolutions and attention, by the formulas of torch's
            FlopCounterMode; a multiplication with an addition counts as two.
        front: (bytes of gradients, bytes of cast weights) -> the most bytes of anything else beside them.

    Args:
        known: tensors from before, which are not counted.
        weights: tensors whose copies in another precision are cast weights.
    """

    def __init__(self, known: Iterable[Tensor] = (), weights: Iterable[Tensor] = ()):
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self.front: dict[tuple[int, int], int] = {}
        self._gradients = self._casts = 0
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._kinds: dict[int, str] = {}
        for tensor in known:
            self._add(tensor, 0, "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        kind = "cast" if func._overloadpacket is _ATEN._to_copy and _key(args[0]) in self._weights else ""
        for value in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value, value.untyped_storage().nbytes(), kind)
        return result

    @contextmanager
    def gradients_of(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Inside, what is accumulated in these parameters' `grad` counts as gradients."""
        hooks = [each.register_post_accumulate_grad_hook(self._gradient) for each in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = _key(parameter.grad)
        if self._kinds.get(key) == "":
            self._kinds[key] = "gradient"
            self._gradients += parameter.grad.untyped_storage().nbytes()
            self._record()

    def _add(self, tensor: Tensor, size: int, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return

        def ended(_: object) -> None:
            self.now -= size
            last = self._kinds.pop(key)
            self._gradients -= size if last == "gradient" else 0
            self._casts -= size if last == "cast" else 0
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, ended)
        self._kinds[key] = kind
        self.now += size
        self._casts += size if kind == "cast" else 0
        self._record()

    def _record(self) -> None:
        self.peak = max(self.peak, self.now)
        place = (self._gradients, self._casts)
        other = self.now - self._gradients - self._casts
        if other > self.front.get(place, -1):
            self.front[place] = other


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any = None, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


#: The CPU's fused attention stands for the GPU's, and FlopCounterMode has no formula for it.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside autocast norms take and give float32: the CPU's list of such functions lacks them. Products are computed
    in bfloat16, whatever this machine's CPU does.
    """

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) else value

    def widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(*args: Any, **kwargs: Any) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return function(*args, **kwargs)
            return function(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})

        return called

    norms: dict[str, Any] = {name: widened(getattr(nn.functional, name)) for name in ("group_norm", "layer_norm")}
    of_a_gpu = mock.patch("fdistill.base.devices.computes_bfloat16", return_value=True)
    with of_a_gpu, mock.patch.multiple(nn.functional, **norms):
        yield


@contextmanager
def fake() -> Iterator[None]:
    """Inside, tensors have no values, and can be copied and converted all the same."""

    def copied(tensor: Any, memo: dict[int, Any]) -> Any:
        if not isinstance(tensor, FakeTensor):
            return tensor  # of a schedule, which has values
        if id(tensor) not in memo:
            value = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, tensor.requires_grad)
            memo[id(tensor)] = value
        return memo[id(tensor)]

    copies = mock.patch.object(Tensor, "__deepcopy__", copied)
    moves = mock.patch.object(nn.Module, "_apply", _applied)
    with FakeTensorMode(allow_non_fake_inputs=True), copies, moves, few_bits_by_size():
        yield


@contextmanager
def few_bits_by_size() -> Iterator[None]:
    """Inside, weights in few bits have the sizes that bitsandbytes gives them, and no values; it is not needed."""

    def encode(weight: Tensor, kind: Any) -> tuple[Tensor, Tensor]:
        count, device = weight.numel(), weight.device
        codes = torch.empty(-(-count // 2) if kind.name == "nf4" else weight.shape, dtype=torch.uint8, device=device)
        return codes, torch.empty(-(-count // kind.block), device=device)

    def decode(codes: Tensor, scales: Tensor, kind: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=codes.device)

    with mock.patch.multiple(quantised_layers, check_installed=mock.DEFAULT, encode=encode, decode=decode):
        yield


def _applied(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which cannot change tensors without values in place."""
    for child in module.children():
        _applied(child, function)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None and (value := function(parameter)).dtype != parameter.dtype:
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and (value := function(buffer)).dtype != buffer.dtype:
                module._buffers[name] = value
    return module
