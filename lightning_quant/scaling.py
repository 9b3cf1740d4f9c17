"""Groups of a unit's layers that take one factor on their input channels, and how it is applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from lightning_quant.blocks import Unit
from lightning_quant.calibration import has_ranks
from lightning_quant.nn import FakeModule
from lightning_quant.pairs import find_pairs
from lightning_quant.rescaling import Pair, channels, scale_pair
from lightning_quant.statistics import put_weight_matrix, weight_matrix


@dataclass(frozen=True)
class Group:
    """Layers whose input columns are multiplied by one factor.

    Args:
        consumers: the quantized ones, by their names in the model.
        channel: int64 `[input channels]`, the factor that each takes.
        pair: which feeder takes the inverse; None: the layer itself multiplies its input by it in every forward pass.
    """

    consumers: tuple[str, ...]
    channel: Tensor
    pair: Pair | None = None

    def columns(self, module: FakeModule) -> Tensor:
        """int64 `[columns of the weight matrix]`: which factor each takes."""
        return self.channel.repeat_interleave(_kernel(module))


def _kernel(module: FakeModule) -> int:
    """Columns of the weight matrix that belong to one input channel."""
    return weight_matrix(module).shape[1] // int(getattr(module, "in_channels", weight_matrix(module).shape[1]))


def find_groups(unit: Unit, modules: dict[str, FakeModule], explicit: bool) -> list[Group]:
    """The groups that a unit's layers form, in the order of execution.

    Args:
        modules: the layers to rescale, by their names in the model.
        explicit: whether layers without a feeder form groups of their own. Convolutions never do: their padding is not rescaled.
    """
    groups: list[Group] = []
    if unit.calls is not None:
        prefix = f"{unit.name}."
        for pair in _pairs(unit):
            names = tuple(f"{prefix}{name}" for name in pair.consumers if f"{prefix}{name}" in modules)
            taken = {name for group in groups for name in group.consumers}
            if names and not taken & set(names):
                groups.append(Group(names, pair.channel, pair))
    taken = {name for group in groups for name in group.consumers}
    for name, module in modules.items():
        if name in taken:
            continue
        if explicit and not isinstance(module, _ConvNd):
            groups.append(Group((name,), torch.arange(weight_matrix(module).shape[1])))
        else:
            unit.note(name, "not rescaled, nothing before it can take the inverse")
    return groups


def _pairs(unit: Unit) -> list[Pair]:
    """A block's pairs: those of an earlier block of the same structure, where they hold here too."""

    def run() -> Any:
        assert unit.calls is not None
        args, kwargs = unit.calls[0]
        return unit.root(*args, **kwargs)

    key = (type(unit.root), tuple((name, tuple(value.shape)) for name, value in unit.root.named_parameters()))
    known = unit.shared.get(key)
    if known is None or not _hold(unit.root, known, run):
        known = find_pairs(unit.root, run)
    if has_ranks():  # each has a batch of its own
        shared = [known]
        dist.broadcast_object_list(shared, 0)
        known = shared[0]
    unit.shared[key] = known
    return known


@torch.no_grad()
def _hold(root: nn.Module, pairs: list[Pair], run: Any) -> bool:
    """Whether rescaling by all pairs at once leaves the output as it is; parameters are put back."""
    generator = torch.Generator().manual_seed(0)
    before = [(parameter, parameter.data) for parameter in root.parameters()]
    plain = [leaf for leaf in tree_leaves(run()) if isinstance(leaf, Tensor)]
    try:
        for pair in pairs:
            size = channels(root.get_submodule(pair.feeder), outputs=True)
            scale_pair(root, pair, torch.rand(size, generator=generator) + 0.5)
        scaled = [leaf for leaf in tree_leaves(run()) if isinstance(leaf, Tensor)]
    finally:
        for parameter, value in before:
            parameter.data = value
    return all(
        bool((one.float() - two.float()).abs().max() <= 1e-4 * one.float().abs().max())
        for one, two in zip(plain, scaled, strict=True)
    )


@torch.no_grad()
def rescale(unit: Unit, group: Group, scale: Tensor) -> None:
    """Multiply a group's input columns by a factor, float32 `[factors]`, and what was learned of its inputs by the inverse."""
    if bool((scale == 1).all()):
        return
    factor = scale[group.channel]
    if group.pair is not None:
        size = channels(unit.root.get_submodule(group.pair.feeder), outputs=True)
        full = torch.ones(size, device=scale.device)
        full[: len(scale)] = scale
        scale_pair(unit.root, group.pair, full)
    for name in group.consumers:
        module = unit.modules[name]
        if group.pair is None:
            put_weight_matrix(module, weight_matrix(module) * factor)
            module.scale_input(1 / factor)
        columns = factor.repeat_interleave(_kernel(module))
        for kind, value in ((kind, found[name]) for kind, found in unit.statistics.items() if name in found):
            if kind == "hessian":
                unit.statistics[kind][name] = value / columns / columns[:, None]
            elif kind in ("low", "high"):
                unit.statistics[kind][name] = value / factor
            elif kind in ("rows", "total"):
                unit.statistics[kind][name] = value / columns
