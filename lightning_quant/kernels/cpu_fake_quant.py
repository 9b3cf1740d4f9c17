"""Fake quantization of integer grids on CPUs, in the C library: one pass forward, one backward, nothing saved but the input.

What was fake-quantized remembers what it was made from, its `Source`. Where a layer saves its quantized input and weight for the
backward pass, `saving_sources` saves the sources instead, which are kept anyway, and quantizes them again when they are needed.
A weight that is used several times before it changes, as gradient accumulation does, is quantized once: see `kept`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lightning_quant.kernels import kept
from lightning_quant.kernels.native import fake
from lightning_quant.kernels.native.fake import Layout, Seen
from lightning_quant.numerics import from_groups, lsq_gradients, qrange, to_groups

# id of what was fake-quantized -> itself and its source, while it lives; an attribute of it would be pickled with it
_SOURCES: dict[int, tuple[weakref.ref[Tensor], Source]] = {}
_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: {} {} is at version {}; "
    "expected version {} instead. Layers with quantizers save their input and weight for the backward pass, as they do in float"
)


class NotFinite(ValueError):
    """What is measured holds nan or inf; no observer has changed."""


# --- what is saved --------------------------------------------------------------------------------------------------


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    """Hooks on saved tensors make autograd leave out this check."""
    if tensor._version != version:
        raise RuntimeError(_CHANGED.format(tensor.dtype, list(tensor.shape), tensor._version, version))
    return tensor


@dataclass(frozen=True)
class Source:
    """What a tensor was fake-quantized from."""

    x: Tensor
    scale: Tensor
    zero_point: Tensor
    layout: Layout
    learned: bool
    version: int
    made: Tensor | None = None  # the quantized tensor, if it is kept

    def quantized(self) -> Tensor:
        """The same tensor again. Raises RuntimeError if what it was made from has changed since."""
        with torch.no_grad():
            x = _unchanged(self.x, self.version).detach()
            if self.made is not None:
                return self.made
            return fake.quantize(x, self.scale, self.zero_point, self.layout, self.learned)[0]


def _remember(y: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, layout: Layout, learned: bool = False) -> Tensor:
    if torch.is_grad_enabled() and not x.is_inference():
        made = kept.made_now()
        key, source = id(y), Source(x, scale.detach(), zero_point.detach(), layout, learned, x._version, made)
        _SOURCES[key] = weakref.ref(y, lambda _: _SOURCES.pop(key, None)), source
    return y


def source_of(quantized: Tensor) -> Source | None:
    """What a tensor was fake-quantized from, if these kernels did it and gradients were enabled."""
    alive, source = _SOURCES.get(id(quantized), (None, None))
    return source if alive is not None and alive() is quantized else None


def _packed_by_others() -> bool:
    """Whether somebody else packs saved tensors, as checkpointing does, which has to see them all."""
    top: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


@contextlib.contextmanager
def saving_sources(*quantized: Tensor) -> Iterator[None]:
    """While it lasts, autograd saves not these tensors but what they were fake-quantized from, to quantize it again when needed.

    The gradients are the same to the bit, and a layer keeps no more than in float. As for any saved tensor, changing a source in
    place before the backward pass is an error there.

    Args:
        quantized: what fake quantization returned; what these kernels have not made is saved as ever.

    Example:
        >>> from lightning_quant import QuantSpec
        >>> from lightning_quant.fake_quant import fake_quantize
        >>> weight, x = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8)
        >>> quantized = fake_quantize(weight, torch.full((4, 1), 0.1), torch.zeros(4, 1, dtype=torch.int32), QuantSpec(8))
        >>> with saving_sources(quantized):
        ...     out = torch.nn.functional.linear(x, quantized)
        >>> out.sum().backward()
    """
    sources: dict[int, tuple[Source, int]] = {}
    for tensor in quantized:
        source = source_of(tensor)
        if source is not None and tensor.numel():
            sources[tensor.data_ptr()] = source, tensor.numel()
    if not sources or not torch.is_grad_enabled() or _packed_by_others():
        yield
        return

    def pack(tensor: Tensor) -> tuple[Any, ...]:
        source, numel = sources.get(tensor.data_ptr(), (None, 0))
        if tensor.numel() != numel:  # transposed and flattened ones are saved, too
            return tensor, tensor._version
        return source, tensor.shape, tensor.stride()

    def unpack(packed: tuple[Any, ...]) -> Tensor:
        if isinstance(packed[0], Source):
            return packed[0].quantized().as_strided(*packed[1:])
        return _unchanged(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


# --- straight-through -----------------------------------------------------------------------------------------------


@dataclass
class _Range:
    """Where scales come from, and once it was used, what they are.

    Args:
        scale, zero_point: given, or None to measure them.
        seen: measure what an observer has seen, with this; None: what is there now.
        finite: raise NotFinite if what is measured is not.
    """

    layout: Layout
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    seen: Seen | None = None
    finite: bool = False

    def quantize(self, x: Tensor) -> tuple[Tensor, bool]:
        """The quantized tensor, and whether any of it was outside."""
        if self.scale is not None and self.zero_point is not None:
            scale, zero_point = self.scale, self.zero_point
            return cast(tuple[Tensor, bool], kept.once(lambda: fake.quantize(x, scale, zero_point, self.layout)))
        y, self.scale, self.zero_point, found = kept.once(lambda: fake.quantize_measured(x, self.layout, self.seen))
        if self.finite and found & fake.NOT_FINITE:
            raise NotFinite
        return y, bool(found & fake.CLIPPED)


def _inside(ctx: Any) -> Tensor:
    """1 where x is within the range, else 0; for gradients that are differentiated again."""
    x, scale, zero_point = ctx.saved_tensors
    spec, axis = ctx.layout.spec, ctx.layout.axis
    low, high = qrange(spec)
    rows = to_groups(x.detach().float(), spec, axis)
    level = (rows * (1.0 / scale.reshape(-1, 1))).round() + zero_point.reshape(-1, 1)
    return from_groups(((level >= low) & (level <= high)).to(x.dtype), x.shape, spec, axis)


class _STE(torch.autograd.Function):
    """The gradient passes inside of the range; where nothing was outside, or what is there defines the range, as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: _Range, everywhere: bool) -> Tensor:
        y, clipped = given.quantize(x)
        ctx.layout, ctx.masked = given.layout, clipped and not everywhere
        if ctx.masked:
            ctx.save_for_backward(x, given.scale, given.zero_point)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.masked:
            return grads[0], None, None
        if torch.is_grad_enabled():
            return grads[0] * _inside(ctx), None, None
        x, scale, zero_point = ctx.saved_tensors
        return fake.mask(grads[0], x, scale, zero_point, ctx.layout), None, None


def _quantize(x: Tensor, given: _Range, everywhere: bool = False) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        y = cast(Tensor, _STE.apply(x, given, everywhere))
    else:
        y = given.quantize(x)[0]
    return _remember(y, x, cast(Tensor, given.scale), cast(Tensor, given.zero_point), given.layout)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, layout: Layout) -> Tensor:
    """`functional.fake_quantize` with a range that is given.

    Args:
        x: what `fake.takes` takes.
        scale, zero_point: float32 and int32, `[layout.scales]` elements.
        layout: of `x`.
    """
    # copies: observers change them in place before the backward pass
    return _quantize(x, _Range(layout, scale.detach().clone(), zero_point.detach().to(torch.int32, copy=True)))


def dynamic_fake_quantize(x: Tensor, layout: Layout) -> Tensor:
    """`functional.dynamic_fake_quantize`: each row with its own range."""
    return _quantize(x, _Range(layout), everywhere=True)


def observed_fake_quantize(x: Tensor, layout: Layout, seen: Seen | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Take a tensor into what an observer has seen, or find the range of each of its scales, and fake-quantize it with that.

    Args:
        x: not empty.
        seen: the observer's state, changed in place; None: the range of now.

    Returns:
        the quantized tensor, and the scale and zero point that it has, flat.

    Raises:
        NotFinite: `x` holds nan or inf.
    """
    given = _Range(layout, seen=seen, finite=True)
    return _quantize(x, given), cast(Tensor, given.scale), cast(Tensor, given.zero_point)


# --- learned scales -------------------------------------------------------------------------------------------------


def _lsq_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients in torch's operators, to be differentiated again."""
    x, scale, zero_point = ctx.saved_tensors
    spec, axis, wanted = ctx.layout.spec, ctx.layout.axis, ctx.needs_input_grad[:3]
    rows, slope = (to_groups(value.float(), spec, axis) for value in (x, grad))
    columns = scale.reshape(-1, 1), zero_point.reshape(-1, 1)
    by_x, by_scale, by_zero = lsq_gradients(slope, rows, *columns, *qrange(spec), ctx.factor, wanted)
    return (
        None if by_x is None else from_groups(by_x, x.shape, spec, axis).to(x.dtype),
        None if by_scale is None else by_scale.reshape(scale.shape),
        None if by_zero is None else by_zero.reshape(zero_point.shape),
    )


class _LSQ(torch.autograd.Function):
    """LSQ and LSQ+: see `numerics.lsq_gradients`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, layout: Layout, factor: float) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.layout, ctx.factor = layout, factor
        return cast(Tensor, kept.once(lambda: fake.quantize(x, scale, zero_point, layout, learned=True))[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return *_lsq_gradients(ctx, grads[0]), None, None
        x, scale, zero_point = ctx.saved_tensors
        found = fake.learn(grads[0], x, scale, zero_point, ctx.layout, ctx.factor)
        return *(value if wanted else None for value, wanted in zip(found, ctx.needs_input_grad)), None, None


def lsq_fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, layout: Layout, factor: float) -> Tensor:
    """`functional.lsq_fake_quantize`.

    Args:
        scale, zero_point: float32, `[layout.scales]` elements.
        factor: of their gradients.
    """
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    y = cast(Tensor, _LSQ.apply(x, scale, zero_point, layout, factor))
    return _remember(y, x, scale, zero_point, layout, learned=True)
