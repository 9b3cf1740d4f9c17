"""Cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721, section 4.1): channels between layers get equal ranges."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_quant.algorithms.base import Algorithm, Cost, weight_quantizer
from lightning_quant.blocks import Unit
from lightning_quant.calibration import has_ranks
from lightning_quant.nn import FakeModule
from lightning_quant.pairs import find_pairs
from lightning_quant.rescaling import Pair, channels, scale_pair

_SAMPLES = 4  # of the first batch: all that the search for pairs runs on


def channel_ranges(module: FakeModule, outputs: bool) -> Tensor:
    """The largest magnitude of the weights of each output (or input) channel, float32 `[channels]`.

    Args:
        module: linear, or a convolution of any groups.
        outputs: of which channels.

    Example:
        >>> from lightning_quant.surgery import prepare
        >>> layer = prepare(nn.Sequential(nn.Linear(2, 3)), "w8a16")[0]
        >>> layer.weight.data = torch.tensor([[1.0, -2.0], [0.0, 3.0], [0.5, 0.0]])
        >>> channel_ranges(layer, outputs=True), channel_ranges(layer, outputs=False)
        (tensor([2.0000, 3.0000, 0.5000]), tensor([1., 3.]))
    """
    weight = module.get_weight("weight").detach().float().abs()
    matrix = weight.flatten(2).amax(2) if weight.dim() > 2 else weight
    if outputs == (module.weight_axes(module)["weight"] == 0):
        return matrix.amax(1)
    groups = int(getattr(module, "groups", 1))  # each has input (transposed: output) channels of its own
    return matrix.view(groups, -1, matrix.shape[1]).amax(1).flatten()


def equalizing_scale(feeder: Tensor, consumers: Tensor) -> Tensor:
    """The factor by which a feeder's channels are divided: `sqrt(r1 / r2)`, which makes both ranges `sqrt(r1 r2)` (equation 11).

    Args:
        feeder, consumers: the ranges r1 and r2 of each channel, `[channels]`. Where one is 0 there is nothing to equalize.

    Example:
        >>> equalizing_scale(torch.tensor([8.0, 1.0, 0.0]), torch.tensor([2.0, 4.0, 1.0]))
        tensor([2.0000, 0.5000, 1.0000])
    """
    return torch.where((feeder > 0) & (consumers > 0), (feeder / consumers.clamp(min=1e-30)).sqrt(), 1.0)


@torch.no_grad()
def equalize(root: nn.Module, pairs: list[Pair], *, sweeps: int = 50, tolerance: float = 1e-3) -> int:
    """Equalize pairs in turn until all are: a layer in the middle of a chain is in two.

    Args:
        root: what the pairs were found in; feeders and consumers are prepared layers.
        sweeps: over all pairs, at most.
        tolerance: the largest factor that is taken for 1, less 1.

    Returns:
        the sweeps that it took.
    """
    modules: dict[str, Any] = dict(root.named_modules())
    for sweep in range(sweeps):
        worst = 0.0
        for pair in pairs:
            channel = pair.channel.to(modules[pair.feeder].get_weight("weight").device)
            first = channel_ranges(modules[pair.feeder], outputs=True)
            ranges = torch.stack([channel_ranges(modules[name], outputs=False) for name in pair.consumers]).amax(0)
            second = torch.zeros_like(first).scatter_reduce(0, channel, ranges, "amax")
            scale = equalizing_scale(first, second)
            scale_pair(root, pair, scale)
            worst = max(worst, float((scale.log().abs()).max()))
        if worst <= tolerance:
            return sweep + 1
    return sweeps


def _first_call(root: nn.Module, run: Callable[[], Any]) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    """The module that a pass calls first, mostly the root itself, and what with."""
    found: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    handles = []
    for name, module in root.named_modules():
        see = lambda _, args, kwargs, name=name: found.append((name, args, kwargs)) if not found else None  # noqa: E731
        handles.append(module.register_forward_pre_hook(see, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _small(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
    """Runs a module on the first samples of a batch, or on all where it does not take fewer."""
    few = tree_map_only(Tensor, lambda value: value[:_SAMPLES] if value.dim() else value, (args, kwargs))
    try:
        root(*few[0], **few[1])
    except Exception:  # any code may run in a user's forward, and not every tensor has a dimension of samples
        return functools.partial(root, *args, **kwargs)
    return functools.partial(root, *few[0], **few[1])


def _searched(unit: Unit) -> tuple[str, nn.Module, Callable[[], Any]] | None:
    """Prefix of names, the module in which pairs are searched, and what runs it; None: there is no example to run."""
    if unit.calls is not None and len(unit.calls):
        args, kwargs = unit.calls[0]
        return f"{unit.name}.", unit.root, _small(unit.root, args, kwargs)
    found = _first_call(unit.root, unit.example) if unit.example is not None else None
    if found is None:
        return None
    name, args, kwargs = found
    root = unit.root.get_submodule(name)
    return f"{name}." if name else "", root, _small(root, args, kwargs)


def _usable(pair: Pair, modules: dict[str, FakeModule], prefix: str) -> bool:
    """Whether a feeder with a weight matrix, and all that read it, are quantized by one scale a tensor, channel or group."""
    layers = [modules.get(f"{prefix}{name}") for name in (pair.feeder, *pair.consumers)]
    return pair.kind == "linear" and all(layer is not None and list(layer.weight_axes(layer)) == ["weight"] for layer in layers)


@torch.no_grad()
def apply_equalization(unit: Unit, *, sweeps: int = 50) -> None:
    """Equalize the ranges of channels between layers, without data; the float function stays the same. Other layers are noted.

    Pairs are what `find_pairs` finds with an example: layers with nothing but ReLU, pooling and the like between them. It helps
    weights with one scale a tensor most; with one a channel, only the layer that reads the channels gains. High biases are not
    absorbed, as the paper does in a later step.

    Args:
        sweeps: over all pairs, at most; they end when all are equalized to a part in a thousand.
    """
    searched = _searched(unit)
    if searched is None:
        for name in unit.modules:
            unit.note(name, "equalization: not rescaled, no example shows what feeds it")
        return
    prefix, root, run = searched
    found = [find_pairs(root, run)]
    if has_ranks():  # each has an example of its own
        dist.broadcast_object_list(found, 0)
    pairs = [pair for pair in found[0] if _usable(pair, unit.modules, prefix)]
    pairs = [pair for pair in pairs if len(pair.channel) == channels(root.get_submodule(pair.feeder), outputs=True)]
    equalize(root, pairs, sweeps=sweeps)
    touched = {f"{prefix}{name}" for pair in pairs for name in (pair.feeder, *pair.consumers)}
    for name, module in unit.modules.items():
        if name in touched:
            weight_quantizer(module).observing = False
            module.observe_weights()
        else:
            unit.note(name, "equalization: not rescaled, what it reads or feeds cannot be")


EQUALIZATION = Algorithm(
    apply_equalization,
    "transform",
    whole=True,
    cost=Cost(passes=lambda *_: 0.1, work=lambda rows, columns, options: 2000.0 * rows * columns),
)
