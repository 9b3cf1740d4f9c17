"""Multiply layers' input columns by a factor and divide what feeds them by it: the float function stays the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_quant.nn import lookup

# what a parameter is replaced by, keyed by id: modules may share a parameter
Values = dict[int, tuple[nn.Parameter, Tensor]]


@dataclass(frozen=True)
class Pair:
    """A feeder and the layers whose input columns can be rescaled at its expense; `scale_pair` does it.

    Args:
        feeder: qualified name relative to the root that was searched.
        kind: what is divided: `"norm"` (a norm's weight and bias), `"norm+1"` (a norm that multiplies by `1 + weight`, as
            Gemma's), `"linear"` (a weight matrix's output channels, and the bias).
        consumers: names of all the layers that read these channels, in the order in which they run.
        channel: int64 `[consumer's input channels]`, the feeder's channel behind each. The identity for most; grouped-query
            attention repeats channels, and of a fused projection it has only the part that can be scaled.
    """

    feeder: str
    kind: str
    consumers: tuple[str, ...]
    channel: Tensor = field(compare=False)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    value = module._parameters.get(name)
    return value if value is not None and value.is_floating_point() else None


def is_layer(module: nn.Module) -> bool:
    weight, found = own_parameter(module, "weight"), lookup(type(module))
    return weight is not None and weight.dim() > 1 and (found is None or not issubclass(found[0], (nn.Embedding, nn.EmbeddingBag)))


def is_norm_like(module: nn.Module) -> bool:
    weight = own_parameter(module, "weight")
    return weight is not None and weight.dim() == 1 and not any(True for _ in module.children())


def weight_of(module: nn.Module) -> nn.Parameter:
    weight = own_parameter(module, "weight")
    assert weight is not None
    return weight


def _along_first(module: nn.Module, outputs: bool) -> bool:
    """Whether a layer's output (or input) channels are dimension 0 of its weight."""
    found = lookup(type(module))
    axis = 0 if found is None else found[1].fake.weight_axes(module).get("weight", 0)
    return outputs == (axis == 0)


def channels(module: nn.Module, outputs: bool) -> int:
    first, *second = weight_of(module).shape[:2]
    return first if not second or _along_first(module, outputs) else second[0] * getattr(module, "groups", 1)


def _spread(module: nn.Module, factor: Tensor, outputs: bool) -> Tensor:
    """A factor for each output (or input) channel, shaped to multiply the weight. Groups of a convolution have own channels."""
    weight = weight_of(module)
    factor = factor.to(torch.promote_types(weight.dtype, torch.float32)).to(weight.device)
    if _along_first(module, outputs):
        matrix = factor.view(-1, 1)
    else:
        groups, (first, second) = getattr(module, "groups", 1), weight.shape[:2]
        matrix = factor.view(groups, 1, second).expand(groups, first // groups, second).reshape(first, second)
    return matrix.view(*matrix.shape, *[1] * (weight.dim() - 2))


def scale_output(module: nn.Module, kind: str, factor: Tensor) -> Values:
    """The parameters with which a feeder's output channels are `factor` times what they are; float64 `[channels]`, on the CPU."""
    weight, bias = weight_of(module), own_parameter(module, "bias")
    if kind == "linear":
        scaled = weight * _spread(module, factor, outputs=True)
    else:
        shift = float(kind == "norm+1")
        scaled = (weight.cpu().double() + shift) * factor - shift  # not every device has float64
    values = {id(weight): (weight, scaled.to(weight))}
    if bias is not None:
        values[id(bias)] = (bias, (bias.cpu().double() * factor).to(bias))
    return values


def scale_inputs(modules: Iterable[nn.Module], factor: Tensor) -> Values:
    """The weights of layers with their input columns times `factor` `[columns]`."""
    weights = {id(weight_of(module)): (weight_of(module), module) for module in modules}
    return {
        key: (weight, (weight * _spread(module, factor, outputs=False)).to(weight.dtype))
        for key, (weight, module) in weights.items()
    }


@dataclass(frozen=True)
class Feeder:
    """What is probed: a norm or layer, the kind that a pair would have, and the number of its output channels."""

    name: str
    module: nn.Module
    kind: str
    size: int

    @property
    def codes(self) -> Tensor:
        """The exponents to probe with, never 0: wide enough that what saturates does, exact in the weight's dtype."""
        dtype = weight_of(self.module).dtype
        if self.kind == "norm+1":  # 2^k - 1 takes k bits
            return torch.arange(1, {torch.float16: 4, torch.bfloat16: 8}.get(dtype, 16) + 1)
        most = 3 if dtype == torch.float16 else 16
        return torch.cat([torch.arange(-most, 0), torch.arange(1, most + 1)])

    def values(self, sign: int, exponents: Tensor | None = None) -> Values:
        """Parameters whose output is that of the base times `2^exponents`. The base: what they are, or its negative; a norm of
        `1 + weight` has the base `±1`, whose multiples are exact."""
        factor = sign * (torch.zeros(self.size) if exponents is None else exponents).double().exp2()
        values = scale_output(self.module, self.kind, factor)
        if self.kind == "norm+1":
            weight = weight_of(self.module)
            values[id(weight)] = (weight, (factor - 1).to(weight.device, weight.dtype))
        return values


@contextlib.contextmanager
def rebound(values: Values) -> Iterator[None]:
    """Parameters with other tensors for a while; their own are put back as they were, storage and all."""
    before = [(parameter, parameter.data) for parameter, _ in values.values()]
    try:
        for parameter, value in values.values():
            parameter.data = value
        yield
    finally:
        for parameter, value in before:
            parameter.data = value


@torch.no_grad()
def scale_pair(root: nn.Module, pair: Pair, scale: Tensor) -> None:
    """Multiply the consumers' input columns by `scale[pair.channel]` and divide the feeder's output by `scale`.

    The float function stays the same. Parameters get new tensors: what shared the old storage keeps its values. Ranges of
    quantizers are not measured anew.

    Args:
        root: the module that the pair was found in, or a copy of it.
        pair: from `find_pairs`.
        scale: positive `[feeder's channels]`; channels that the pair does not map are left alone.

    Raises:
        ValueError: a name is not in `root`, or `scale` has another shape, or is not positive and finite.

    Example:
        >>> net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
        >>> x = torch.randn(5, 4)
        >>> before, pair = net(x), Pair("0", "norm", ("1",), torch.arange(4))
        >>> scale_pair(net, pair, torch.tensor([0.5, 1.0, 2.0, 4.0]))
        >>> net[0].weight.data, torch.allclose(net(x), before, atol=1e-5)
        (tensor([2.0000, 1.0000, 0.5000, 0.2500]), True)
    """
    named = dict(root.named_modules())
    missing = [name for name in (pair.feeder, *pair.consumers) if name not in named]
    if missing:
        raise ValueError(
            f"pair {pair.feeder!r}: no module {', '.join(map(repr, missing))} in this root: pass the one it was found in"
        )
    size = channels(named[pair.feeder], outputs=True)
    if tuple(scale.shape) != (size,):
        raise ValueError(f"{pair.feeder}: scale has shape {list(scale.shape)}, but the feeder has {size} channels: pass [{size}]")
    factor, channel = scale.detach().double().cpu(), pair.channel.cpu()
    used = torch.zeros(size, dtype=torch.bool)
    used[channel] = True
    bad = used & ~(factor.isfinite() & (factor > 0))
    if bad.any():
        index = int(bad.nonzero()[0])
        raise ValueError(f"{pair.feeder}: scale[{index}] is {factor[index].item()}, but a factor must be positive and finite")
    factor = torch.where(used, factor, 1.0)
    values = scale_output(named[pair.feeder], pair.kind, 1 / factor)
    values.update(scale_inputs([named[name] for name in pair.consumers], factor[channel]))
    for parameter, value in values.values():
        parameter.data = value
