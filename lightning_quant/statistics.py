"""What algorithms learn of layers' inputs while calibration data passes, in one pass for all that a recipe needs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_quant.calibration import all_reduce, has_ranks
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.nn import FakeModule

# kind -> layer -> tensor
Statistics = dict[str, dict[str, Tensor]]

# rows of inputs that are kept as they are, of each layer
SAMPLES = 256

# kind -> how ranks merge it; "rows" are each rank's own
KINDS = {"hessian": "sum", "total": "sum", "count": "sum", "low": "min", "high": "max", "rows": None}


def weight_matrix(module: FakeModule) -> Tensor:
    """A layer's weight as `[channels, columns]`, float32."""
    return module.effective_weight("weight").detach().float().movedim(module.weight_axes(module)["weight"], 0).flatten(1)


@torch.no_grad()
def put_weight_matrix(module: FakeModule, matrix: Tensor) -> None:
    """Give a layer the weight `[channels, columns]`. The storage is a new one: another model may share the old."""
    axis, weight = module.weight_axes(module)["weight"], module.get_weight("weight")
    weight.data = matrix.view(weight.movedim(axis, 0).shape).movedim(0, axis).to(weight.dtype).contiguous()


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


def _measure(module: FakeModule, x: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if why_no_rows(module):
        return found
    if "low" in kinds:
        channels = x.detach().movedim(module.input_axis, -1).reshape(-1, x.shape[module.input_axis])
        found["low"], found["high"] = (end.float() for end in torch.aminmax(channels, dim=0))
    if {"hessian", "total", "rows"} & set(kinds):
        rows = input_rows(module, x)
        if "hessian" in kinds:
            found["hessian"] = rows.T @ rows
        found["total"], found["count"] = rows.sum(0), torch.tensor(float(len(rows)))
        if "rows" in kinds:
            found["rows"] = rows
    return found


def _merge(name: str, into: dict[str, dict[str, Tensor]], found: dict[str, Tensor], seen: int) -> None:
    for kind, value in found.items():
        kept = into.setdefault(kind, {})
        if kind == "rows":  # as many of each batch: the kept ones are thinned out as more come
            share = max(SAMPLES // seen, 1)
            step = max(len(value) // share, 1)
            fresh = value[step // 2 :: step][:share].clone()
            old = kept.get(name)
            kept[name] = fresh if old is None else torch.cat([old[:: -(-len(old) // max(SAMPLES - share, 1))], fresh])
        elif name not in kept:
            kept[name] = value.clone()
        elif kind in ("low", "high"):
            kept[name] = (torch.minimum if kind == "low" else torch.maximum)(kept[name], value)
        else:
            kept[name].add_(value)


@contextlib.contextmanager
def collecting(
    modules: Mapping[str, FakeModule], kinds: Collection[str], quantized: bool
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Learn of the layers' inputs while it lasts: kind -> layer -> tensor. Layers that were not reached are left out.

    Sums, and smallest and largest values, are those of all ranks at its end.

    Args:
        modules: the layers by name.
        kinds: `"hessian"`, float32 `[columns, columns]`, the sum of `x x^T` over rows x; `"total"` and `"count"`, the sum of rows
            and their number; `"low"` and `"high"`, the range of each input channel; `"rows"`, some rows as they are.
        quantized: whether a layer's own quantized input is meant, where its range is known.
    """
    found: dict[str, dict[str, Tensor]] = {}
    last: list[Any] = [None, "", None]  # q, k and v of attention are given one tensor, which is measured once
    seen: dict[str, int] = {}

    def hook(name: str, module: FakeModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
            return
        own = f"{module.scheme.input} {why_no_rows(module)} {isinstance(module, _ConvNd)}"
        if x is not last[0] or own != last[1]:
            with torch.autocast(x.device.type, enabled=False):  # sums are float32 whatever the model runs in
                last[:] = [x, own, _measure(module, _quantized(module, x) if quantized else x, kinds)]
        seen[name] = seen.get(name, 0) + 1
        _merge(name, found, last[2], seen[name])

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            if module.input_names != ("input",):
                continue
            see = lambda layer, args, kwargs, name=name: hook(name, layer, args, kwargs)  # noqa: E731
            stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        yield found
    if has_ranks():
        _reduce(modules, kinds, found)


def _reduce(modules: Mapping[str, FakeModule], kinds: Collection[str], found: dict[str, dict[str, Tensor]]) -> None:
    """Merge over ranks; of what one rank has not reached it holds nothing yet."""
    for name, module in modules.items():
        if why_no_rows(module):
            continue
        device = next(module.parameters()).device
        reached = torch.tensor(float(any(name in found.get(kind, {}) for kind in kinds)), device=device)
        all_reduce(reached, "max")
        for kind in [kind for kind in KINDS if kind in kinds and reached]:
            mine = found.setdefault(kind, {}).get(name)
            if mine is None:
                mine = found[kind][name] = _nothing(module, kind).to(device)
            if KINDS[kind] is not None:
                all_reduce(mine, str(KINDS[kind]))


def _nothing(module: FakeModule, kind: str) -> Tensor:
    """What a rank contributes for a layer that its data has not reached."""
    columns = weight_matrix(module).shape[1]
    if kind in ("low", "high"):
        channels = int(getattr(module, "in_channels", columns))
        return torch.full((channels,), torch.inf if kind == "low" else -torch.inf)
    return torch.zeros({"hessian": (columns, columns), "total": (columns,), "count": (), "rows": (0, columns)}[kind])


def _quantized(module: FakeModule, x: Tensor) -> Tensor:
    quantizer = module.input_fake_quant
    if not isinstance(quantizer, FakeQuantize) or not (quantizer.spec.dynamic or quantizer.has_range):
        return x
    before, quantizer.quantizing = quantizer.quantizing, True
    try:
        return quantizer(x)
    finally:
        quantizer.quantizing = before
