"""Which layers' input channels can be rescaled at the expense of what feeds them. Found by probing, never by name or class.

SmoothQuant, AWQ and cross-layer equalization multiply input columns of layers (the consumers) by a positive factor and divide the
output channels of what feeds them (a norm, or a linear or convolution layer) by it, so that the float function stays the same.
The probe multiplies a feeder's output channels by powers of two, which no rounding touches, and watches what reaches the layers.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.fold import eagerly
from lightning_quant.rescaling import (
    Feeder,
    Pair,
    Values,
    channels,
    is_layer,
    is_norm_like,
    rebound,
    scale_inputs,
    scale_pair,
    weight_of,
)
from lightning_quant.sharding import is_sharded

__all__ = ["Pair", "find_pairs", "scale_pair"]

_DEAD = 999  # in place of an exponent: the channel is zero throughout
_ROUNDS = 4  # of finding the consumers behind consumers; a router and its experts take three

# --- what a run shows -----------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """One run of the example: how each watched module was called, in the order of first calls, and what came out."""

    calls: dict[str, list[Any]]
    outputs: list[Tensor]

    def inputs(self, name: str) -> list[Tensor]:
        """The floating tensor that each call of a module was given first."""
        found = [[leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor)][:1] for call in self.calls.get(name, [])]
        return [tensors[0] for tensors in found if tensors and tensors[0].is_floating_point()]


def _tolerance(x: Tensor) -> float:
    return 4e-3 if x.dtype == torch.float16 else 1e-5  # of float16 small weights times powers of two are subnormal


def _same(one: list[Tensor], two: list[Tensor]) -> bool:
    """Whether tensors agree, to a tolerance of their largest magnitude."""
    if len(one) != len(two) or any(x.shape != y.shape or x.dtype != y.dtype for x, y in zip(one, two)):
        return False
    for x, y in zip(one, two):
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return False
        elif x.numel():
            x, y, tolerance = x.float(), y.float(), _tolerance(x)
            peak = x.nan_to_num(0.0, 0.0, 0.0).abs().max().item()  # masks hold infinities
            if not torch.allclose(y, x, rtol=0.0, atol=tolerance * peak, equal_nan=True):
                return False
    return True


def _exponents(base: list[Tensor], now: list[Tensor], axis: int) -> Tensor | None:
    """By which power of two each channel grew: int64 `[channels]`, `_DEAD` where it is zero; None if anything else happened."""
    if not base or [x.shape for x in base] != [x.shape for x in now] or base[0].dim() < max(-axis, axis + 1):
        return None
    size = base[0].shape[axis]
    if any(x.shape[axis] != size for x in base) or not sum(x.numel() for x in base):
        return None
    first, second = (torch.cat([x.movedim(axis, -1).reshape(-1, size).float() for x in part]) for part in (base, now))
    peak, row = first.abs().max(0)
    live = peak > 0
    ratio = torch.where(live, second.gather(0, row[None])[0] / first.gather(0, row[None])[0], 1.0)
    if not (ratio.isfinite() & (ratio > 0)).all():
        return None
    exponent = ratio.log2().round()
    grown = exponent.exp2()
    if not ((second - first * grown).abs().amax(0) <= _tolerance(base[0]) * peak * grown).all():
        return None
    return torch.where(live, exponent.long(), _DEAD).cpu()


def _agree(found: Tensor | None, wanted: Tensor) -> bool:
    """Whether exponents are the wanted ones, where they are known."""
    return found is not None and len(found) == len(wanted) and bool(((found == wanted) | (found == _DEAD)).all())


def _alive(found: Tensor | None) -> bool:
    return found is not None and bool((found != _DEAD).any())


# --- the search -----------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """The example does not run with a rescaled feeder."""


class _Search:
    """Runs the example with changed parameters and compares what the layers get."""

    def __init__(self, root: nn.Module, run: Callable[[], Any], consumers: Mapping[str, nn.Module] | None) -> None:
        named = dict(root.named_modules())
        self.root, self.run, self.random = root, run, torch.Generator().manual_seed(0)
        self.layers = {name: module for name, module in named.items() if is_layer(module)}
        self.norms = {name: module for name, module in named.items() if is_norm_like(module)}
        for name, module in (consumers or {}).items():
            if name not in self.layers or self.layers[name] is not module:
                raise ValueError(
                    f"{name!r} ({type(module).__name__}) is no linear or convolution layer of the root under this name: name "
                    f"consumers relative to the root that is searched, as root.named_modules() does"
                )
        self.base = self.see({})
        if not self.base.outputs:
            raise ValueError("run() returned no tensor, so nothing tells whether the function changed: return the root's output")
        self.steady = self.equal(self.base, self.see({}))
        self.allowed = [name for name in self.base.calls if name in (self.layers if consumers is None else consumers)]
        inside = {f"{name}.out_proj".lstrip(".") for name, part in named.items() if isinstance(part, nn.MultiheadAttention)}
        self.unseen = [name for name in self.layers if name not in self.base.calls and name not in inside]

    def see(self, values: Values) -> _Seen:
        seen = _Seen({}, [])
        copy = lambda value: tree_map_only(Tensor, torch.clone, value)  # noqa: E731  # what reads it may write into it

        def watch(name: str) -> Callable[..., None]:
            return lambda _, args, kwargs: seen.calls.setdefault(name, []).append((copy(args), copy(kwargs)))

        handles = []
        try:
            for name, module in {**self.layers, **self.norms}.items():
                handles.append(module.register_forward_pre_hook(watch(name), with_kwargs=True))
            with rebound(values):
                try:
                    outputs = self.run()
                except Exception as error:  # any code may run in a user's forward, and large numbers may be more than it takes
                    if not values:
                        raise
                    raise _Refused from error
                seen.outputs = [leaf.clone() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def equal(self, one: _Seen, two: _Seen, but: Iterable[str] = ()) -> bool:
        """Whether the outputs, and the inputs of all layers but some, are the same."""
        names = [name for name in self.layers if name not in set(but)]
        return _same(one.outputs, two.outputs) and all(_same(one.inputs(name), two.inputs(name)) for name in names)

    def grown(self, name: str, base: _Seen, now: _Seen) -> Tensor | None:
        module = self.layers[name]
        exponents = _exponents(base.inputs(name), now.inputs(name), 1 - weight_of(module).dim())
        return exponents if exponents is not None and len(exponents) == channels(module, outputs=False) else None

    def feeders(self) -> Iterator[Feeder]:
        for name in list(self.base.calls):
            if name in self.layers:
                yield Feeder(name, self.layers[name], "linear", channels(self.layers[name], outputs=True))
            elif (kind := self.norm_kind(name)) is not None:
                yield Feeder(name, self.norms[name], kind, channels(self.norms[name], outputs=True))

    def norm_kind(self, name: str) -> str | None:
        """Whether a module multiplies its output's channels by its weight, or by one more; None if by neither."""
        module = self.norms[name]
        args, kwargs = self.base.calls[name][0]
        for kind in ("norm", "norm+1"):
            feeder = Feeder(name, module, kind, len(weight_of(module)))
            wanted = feeder.codes[torch.arange(feeder.size) % len(feeder.codes)]
            outputs = []
            for exponents in (None, wanted):
                with rebound(feeder.values(1, exponents)):
                    outputs.append(module(*args, **kwargs))
            before, after = outputs
            if not isinstance(before, Tensor) or not isinstance(after, Tensor):
                return None
            for axis in (-1, 1):
                found = _exponents([before], [after], axis)
                if _alive(found) and _agree(found, wanted):
                    return kind
        return None

    def base_of(self, feeder: Feeder, sign: int) -> _Seen:
        return self.base if sign == 1 and feeder.kind != "norm+1" else self.see(feeder.values(sign))

    def read_channels(self, feeder: Feeder, part: range, sign: int, base: _Seen) -> dict[str, Tensor]:
        """Layers whose whole input follows a part of the feeder's channels -> the channel behind each column, -1 if it is zero.

        A run tells one digit of each channel's index, as an exponent.
        """
        codes, index = feeder.codes, torch.arange(len(part))
        digits_of = torch.full((2 * _DEAD,), -1)
        digits_of[codes + _DEAD] = torch.arange(len(codes))
        found: dict[str, Tensor] = {}
        place = 1
        while place == 1 or (place < len(part) and found):
            exponents = torch.zeros(feeder.size, dtype=torch.long)
            exponents[part.start : part.stop] = codes[index // place % len(codes)]
            now = self.see(feeder.values(sign, exponents))
            read: dict[str, Tensor] = {}
            for name in found or self.allowed:
                grown = self.grown(name, base, now)
                if grown is None or (grown == _DEAD).all():
                    continue
                digits = torch.where(grown == _DEAD, 0, digits_of[grown.clamp(-_DEAD, _DEAD - 1) + _DEAD])
                sums = found.get(name, torch.where(grown == _DEAD, -1, part.start)) + digits * place
                if (digits >= 0).all() and (sums < part.stop).all():
                    read[name] = sums
            found, place = read, place * len(codes)
        return found

    def rescale(self, feeder: Feeder, channel: Tensor, sign: int, names: Iterable[str]) -> tuple[_Seen, Tensor]:
        """A run with random factors on the feeder and layers compensated; and the exponents that their inputs should show."""
        exponents = torch.zeros(feeder.size, dtype=torch.long)
        exponents[channel] = feeder.codes[torch.randint(len(feeder.codes), channel.shape, generator=self.random)]
        wanted = exponents[channel]
        compensated = scale_inputs([self.layers[name] for name in names], (-wanted).double().exp2())
        return self.see({**feeder.values(sign, exponents), **compensated}), wanted

    def settle(self, feeder: Feeder, channel: Tensor, base: _Seen, names: set[str]) -> set[str] | None:
        """The layers that the feeder itself feeds, if the function stays the same when all of them are compensated.

        Among those that seem to be, some may follow another one, and some show only once another one is compensated.
        """
        for _ in range(_ROUNDS):
            now, wanted = self.rescale(feeder, channel, 1, names)
            grown = {name: self.grown(name, base, now) for name in self.allowed}
            fed = {name for name, found in grown.items() if _alive(found) and _agree(found, wanted)}
            if fed == names or not fed:
                return names if fed and self.equal(base, now, but=names) else None
            names = fed
        return None

    def holds(self, feeder: Feeder, channel: Tensor, base: _Seen, names: set[str]) -> bool:
        """Whether the same goes for the feeder's negative, which shows what the example left out, such as an ELU's other half."""
        now, wanted = self.rescale(feeder, channel, -1, names)
        return self.equal(base, now, but=names) and all(_agree(self.grown(name, base, now), wanted) for name in names)

    def find(self, feeder: Feeder, part: range) -> Pair | None:
        """The pair of this part of a feeder's channels, if it is one."""
        try:
            base = self.base_of(feeder, 1)
            found = self.read_channels(feeder, part, 1, base)
            if not found:
                return None
            first, channel = next(iter(found.items()))
            dead = channel < 0
            negative = self.base_of(feeder, -1) if feeder.kind == "linear" or dead.any() else None
            if negative is not None and dead.any():  # behind a ReLU, the negative shows what is zero
                other = self.read_channels(feeder, part, -1, negative).get(first, channel)
                channel = torch.where(dead, other, channel)
            if not _complete(channel, part):
                return None
            names = self.settle(feeder, channel, base, set(found))
            if names is None or (negative is not None and not self.holds(feeder, channel, negative, names)):
                return None
        except _Refused:
            return None
        missed = [name for name in self.unseen if channels(self.layers[name], outputs=False) == len(channel)]
        if missed:
            warnings.warn(
                f"{feeder.name}: left out of the pairs, as {', '.join(missed)} did not run in the example and may read the same "
                f"channels; use an example that reaches every layer",
                stacklevel=4,
            )
            return None
        return Pair(feeder.name, feeder.kind, tuple(name for name in self.allowed if name in names), channel)

    def parts(self, feeder: Feeder) -> list[range]:
        """Where a fused projection may hold what feeds a layer: its halves or thirds, or the values of grouped-query attention."""
        parts: dict[range, None] = {}
        for columns in {channels(self.layers[name], outputs=False) for name in self.allowed if feeder.kind == "linear"}:
            values, odd = divmod(feeder.size - columns, 2)
            if feeder.size in (2 * columns, 3 * columns):
                parts.update({range(start, start + columns): None for start in range(0, feeder.size, columns)})
            if not odd and 0 < values < columns and columns % values == 0:
                parts[range(feeder.size - values, feeder.size)] = None
        return list(parts)


def _complete(channel: Tensor, part: range) -> bool:
    """Fill in the channels of columns that are zero whatever the feeder does; False if the others, not consecutive, do not tell."""
    known, index = channel >= 0, torch.arange(len(channel))
    shift = (channel - index)[known]
    if not known.all():
        channel[~known] = (index + shift[0])[~known]
    return bool(known.all() or ((shift == shift[0]).all() and channel[0] >= part.start and channel[-1] < part.stop))


@contextlib.contextmanager
def _probing(root: nn.Module) -> Iterator[None]:
    """Evaluation mode, quantizers off, every module called as written, no gradients; all as it was afterwards."""
    modes = [(module, module.training) for module in root.modules()]
    flags = [(part, part.observing, part.quantizing) for part in root.modules() if isinstance(part, FakeQuantize)]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        root.eval()
        for part, _, _ in flags:
            part.observing = part.quantizing = False
        torch.backends.mha.set_fastpath_enabled(False)  # it reads the weights of layers and calls none of them
        with torch.no_grad(), eagerly():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, observing, quantizing in flags:
            part.observing, part.quantizing = observing, quantizing
        for module, training in modes:
            module.training = training


def find_pairs(root: nn.Module, run: Callable[[], Any], consumers: Mapping[str, nn.Module] | None = None) -> list[Pair]:
    """Find what can be rescaled at the expense of what feeds it, by running an example with rescaled feeders.

    A pair is taken only if, with random factors on the feeder's channels and all of its consumers compensated, the whole output and
    the input of every other layer stay the same. Each norm and layer takes a run, each pair some five more: search block by block,
    and a model as a whole only for what lies between blocks. Float parameters are probed, with quantizers switched off.

    Args:
        root: a block or model; its parameters, flags and modes are as before afterwards. A norm outside of it is not found.
        run: runs `root` on a small example and returns its output. Every layer should run in it (all experts, too).
        consumers: the layers to take as consumers, by name relative to `root`; by default all with a floating `weight` of two or
            more dimensions. What a feeder feeds beside them forbids the pair.

    Returns:
        the pairs in the order in which their feeders run; none, with a warning, if two runs of the example differ.

    Raises:
        ValueError: `run` returns no tensor, `root` is sharded, or a consumer is no such layer of `root`.

    Example:
        >>> net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(5, 4)
        >>> [(pair.feeder, pair.kind, pair.consumers) for pair in find_pairs(net, lambda: net(x))]
        [('0', 'norm', ('1',)), ('1', 'linear', ('3',))]
    """
    if is_sharded(root):
        raise ValueError("the model is sharded (fully_shard): find pairs before, or in a plain copy of it")
    with _probing(root):
        search = _Search(root, run, consumers)
        if not search.steady:
            warnings.warn(
                "two runs of the example give different outputs, so no rescaling can be verified and no pair is taken; let run() "
                "repeat the same input without randomness (dropout, sampling, a growing cache)",
                stacklevel=2,
            )
            return []
        pairs = []
        for feeder in search.feeders():
            whole = search.find(feeder, range(feeder.size))
            found = [whole] if whole is not None else [search.find(feeder, part) for part in search.parts(feeder)]
            pairs += [pair for pair in found if pair is not None]
    return pairs
