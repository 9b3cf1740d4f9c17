"""What algorithms learn of a layer's inputs while calibration data passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_quant.calibration import all_reduce, has_ranks
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.nn import FakeModule


def weight_matrix(module: FakeModule) -> Tensor:
    """A layer's weight as `[channels, columns]`, float32."""
    return module.effective_weight("weight").detach().float().movedim(module.weight_axes(module)["weight"], 0).flatten(1)


@torch.no_grad()
def put_weight_matrix(module: FakeModule, matrix: Tensor) -> None:
    """Write `[channels, columns]` into a layer's weight."""
    axis, weight = module.weight_axes(module)["weight"], module.get_weight("weight")
    weight.copy_(matrix.view(weight.movedim(axis, 0).shape).movedim(0, axis))


def why_no_rows(module: FakeModule) -> str:
    """Why a layer's output is no product of its weight matrix with rows of inputs; empty if it is."""
    if list(module.weight_axes(module)) != ["weight"] or module.input_names != ("input",):
        return "it has more than one weight"
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and type(module).__name__ != "FakeConv1D":
        return "not for this type of layer"
    if isinstance(module, _ConvNd) and (module.groups > 1 or module.transposed):
        return "not for grouped convolutions"
    return ""


def input_rows(module: FakeModule, x: Tensor) -> Tensor:
    """The inputs of a layer as `[samples, columns]`, float32, such that its output is `rows @ weight_matrix.T`."""
    x = x.detach().float()
    if not isinstance(module, _ConvNd):
        return x.reshape(-1, x.shape[-1])
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding: tuple[Any, ...] = (0,) * len(module.kernel_size)
    elif isinstance(module.padding, str):
        x = F.pad(x, module._reversed_padding_repeated_twice)
        padding = (0,) * len(module.kernel_size)
    else:
        padding = tuple(module.padding)
    sizes: list[Any] = [module.kernel_size, module.dilation, padding, module.stride]
    if len(module.kernel_size) == 1:  # a convolution over rows of height 1
        x, sizes = x[..., None, :], [(first, *size) for first, size in zip((1, 1, 0, 1), sizes, strict=True)]
    return F.unfold(x, *sizes).transpose(1, 2).flatten(0, 1)


@contextlib.contextmanager
def hessians(modules: Mapping[str, FakeModule]) -> Iterator[dict[str, Tensor]]:
    """Collect each layer's Hessian while it lasts: name -> float32 `[columns, columns]`, the sum of `x x^T`.

    At its end the sums are those of all ranks. Layers that were not reached are left out. Where a layer's input is to be quantized,
    it is the quantized input's.
    """
    found: dict[str, Tensor] = {}
    last: list[Any] = [None, "", None]  # q, k and v of attention are given one tensor: its product is computed once

    def see(name: str, module: FakeModule, x: Tensor) -> None:
        kind = str(module.scheme.input)
        if x is not last[0] or kind != last[1]:
            rows = input_rows(module, _quantized(module, x))
            last[:] = [x, kind, rows.T @ rows]
        if name in found:
            found[name].add_(last[2])
        else:
            found[name] = last[2].clone()

    handles = []
    for name, module in modules.items():
        if not why_no_rows(module):

            def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                if x.numel():
                    see(name, layer, x)

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if has_ranks():
        for name in modules:
            if name in found:
                all_reduce(found[name], "sum")


def _quantized(module: FakeModule, x: Tensor) -> Tensor:
    quantizer = module.input_fake_quant
    if not isinstance(quantizer, FakeQuantize):
        return x
    before, quantizer.quantizing = quantizer.quantizing, True
    try:
        return quantizer(x)
    finally:
        quantizer.quantizing = before
