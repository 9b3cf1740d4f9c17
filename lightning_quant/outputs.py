"""The means of layers' outputs over calibration data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_quant.calibration import all_reduce, has_ranks
from lightning_quant.nn import FakeModule
from lightning_quant.rescaling import channels


def why_no_bias(module: FakeModule) -> str:
    """Why a constant for each output channel cannot be added to a layer; empty if it can."""
    if list(module.weight_axes(module)) != ["weight"] or module.input_names != ("input",):
        return "it has more than one weight"
    plain = isinstance(module, (nn.Linear, _ConvNd)) or type(module).__name__ == "FakeConv1D"
    return "" if plain and "bias" in module.packed_type.optional_float else "not for this type of layer"


def output_sums(module: FakeModule, output: Any) -> Tensor:
    """The sum of a layer's output over all but its channels, and at the end how many rows that were: float32 `[channels + 1]`."""
    rows = output.detach().float().movedim(getattr(module, "output_axis", -1), -1)
    rows = rows.reshape(-1, rows.shape[-1])
    return torch.cat([rows.sum(0), rows.new_tensor([float(len(rows))])])


@contextlib.contextmanager
def summing_outputs(modules: Mapping[str, FakeModule]) -> Iterator[dict[str, Tensor]]:
    """Sum up layers' outputs while it lasts: layer -> what `output_sums` gives, of all ranks at its end.

    Layers that were not reached, and such as have no bias, are left out.

    Example:
        >>> from lightning_quant.surgery import prepare
        >>> layer = prepare(nn.Sequential(nn.Linear(2, 3)), "w8a16")[0]
        >>> with summing_outputs({"0": layer}) as sums:
        ...     y = layer(torch.randn(5, 2))
        >>> torch.allclose(sums["0"][:-1] / sums["0"][-1], y.mean(0), atol=1e-6)
        True
    """
    found: dict[str, Tensor] = {}
    able = {name: module for name, module in modules.items() if not why_no_bias(module)}

    def add(name: str, module: FakeModule, output: Any) -> None:
        sums = output_sums(module, output)
        found[name] = found[name] + sums if name in found else sums

    with contextlib.ExitStack() as stack:
        for name, module in able.items():
            see = lambda layer, args, output, name=name: add(name, layer, output)  # noqa: E731
            stack.callback(module.register_forward_hook(see).remove)
        yield found
    if not has_ranks():
        return
    for name, module in able.items():
        device = module.get_weight("weight").device
        mine = found.get(name, torch.zeros(channels(module, outputs=True) + 1, device=device))
        all_reduce(mine, "sum")
        if mine[-1] > 0:
            found[name] = mine
