"""`FakeQuantize`: the quantizer of one tensor, its range and its place in a training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_quant.functional import dynamic_fake_quantize, fake_quantize, lsq_fake_quantize, native_layout
from lightning_quant.gradients import PLAIN, Rule, nearest_level, refit_scale
from lightning_quant.kernels.kept import Kept
from lightning_quant.numerics import MIN_SCALE, calc_qparams, from_groups, qparams_shape, qrange, to_groups
from lightning_quant.observers import make_observer, plain_momentum
from lightning_quant.sharding import is_managed, put, whole
from lightning_quant.spec import QuantSpec

# bits of the narrowest integers: what is to have at least so many keeps its own width
NARROWEST = 2


def widened(spec: QuantSpec, bits: int) -> QuantSpec:
    """The spec with at least so many bits, if it is one of integers.

    Example:
        >>> widened(QuantSpec(2), 4).bits, widened(QuantSpec(8), 4).bits
        (4, 8)
    """
    return replace(spec, bits=max(bits, spec.bits)) if spec.is_int else spec


class _Link(torch.autograd.Function):
    """The identity, that gives other tensors a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others)


def keep_fp32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A `Module._apply` function that moves float32 tensors but never casts them: bf16 scales would change codes."""

    def apply(tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return fn(tensor)
        return fn(tensor.detach().view(torch.int32)).view(torch.float32)

    return apply


class FakeQuantize(nn.Module):
    """The quantizer of one tensor: observes its range, and puts it on the grid.

    `observing` and `quantizing` are plain flags, both off at first; switching them never changes parameters or buffers. An
    observing activation takes every batch into its range; an observing weight, while it is quantized, has the range of now.

    Args:
        spec: how the tensor is quantized.
        shape: the tensor's shape, for a weight; None for an activation, whose range is calibrated or dynamic.
        axis: as in `to_groups`.
        name: the tensor's qualified name, for messages.
        observer, observer_options: a key of `OBSERVERS` and its keyword arguments.
        rule: what its method does; where scales learn, `scale`, and `zero_point` if asymmetric, are parameters, initialised from
            the observer.

    Example:
        >>> fq = FakeQuantize(QuantSpec(8, symmetric=False, granularity="tensor"))
        >>> fq.observing = True
        >>> _ = fq(torch.tensor([-1.0, 3.0]))
        >>> fq.observing, fq.quantizing = False, True
        >>> fq.update_qparams()
        >>> fq(torch.tensor([1.0, 9.0]))
        tensor([1.0039, 2.9961])
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: torch.Size | tuple[int, ...] | None = None,
        *,
        axis: int = -1,
        name: str = "input",
        observer: str = "minmax",
        observer_options: dict[str, Any] | None = None,
        rule: Rule = PLAIN,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.spec = self.final_spec = spec  # of now, and at the end of the training
        self.axis, self.name = axis, name
        self.is_weight = shape is not None
        # of a weight's elements, how many are quantized in a training step
        self.share = 1.0
        # quantized weights that are used again before they change, while somebody drops them in time
        self.kept: Kept | None = None
        self.rule = rule
        self.learned = rule.fake is not None and not spec.dynamic and spec.is_int
        self.observing = self.quantizing = False
        # DDP waits for a gradient of every parameter: learned ones then stay in the graph while nothing is quantized
        self.linked = False
        self.has_range = spec.dynamic
        self._stale = False
        if spec.dynamic:
            return
        size = qparams_shape(shape or (1,), spec, axis)
        # a weight's range is measured from the weight itself, without state
        self.observer = make_observer(observer, spec, 0 if self.is_weight else 1, observer_options).to(device)
        scale = torch.zeros(size, dtype=torch.float32, device=device)  # whatever the default dtype
        zero_point = torch.zeros(size, dtype=torch.int32, device=device)
        if self.learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        if self.learned and rule.learns_zero_point and not spec.symmetric:
            self.zero_point = nn.Parameter(zero_point.float())
        else:
            self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.dynamic:
            return dynamic_fake_quantize(x, self.spec, self.axis) if self.quantizing else x
        if self.kept is None or torch.compiler.is_compiling() or not self._repeats(x):
            return self._pass(x)
        measured = self.observing and not self.learned  # else the scale is what it was
        with self.kept.used(x, self.spec, self.observing, *(() if measured else (self.scale, self.zero_point))):
            return self._pass(x)

    def _pass(self, x: Tensor) -> Tensor:
        if self.observing and self._takes_part():
            fused = self._observe_and_quantize(x)
            if fused is not None:
                return fused
            self.observe(x)
        if not self.quantizing:
            return _Link.apply(x, *self.parameters()) if self.linked and self.learned and torch.is_grad_enabled() else x
        if self.observing and self.waits:
            return x
        if self._stale:
            self.update_qparams()
        if not (self.has_range or self.is_weight or self.training):
            return x  # no training batch has reached it yet, as in a part that only evaluation runs
        self.require_range()
        if self.learned:
            elements = x[0].numel() if not self.is_weight and x.dim() > 1 else None
            fake = self.rule.fake or lsq_fake_quantize
            return fake(x, self.safe_scale(), self.zero_point, self.spec, self.axis, elements)
        return fake_quantize(x, self.scale, self.zero_point, self.spec, self.axis)

    def _repeats(self, weight: Tensor) -> bool:
        """Whether what is made of a weight may be wanted once more."""
        return self.quantizing and self.training and isinstance(weight, nn.Parameter) and torch.is_grad_enabled()

    @property
    def levels(self) -> tuple[int, ...] | None:
        """The codes in use; None: every one."""
        return self.rule.levels(self.spec)

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code in use."""
        return qrange(self.spec) if self.levels is None else (self.levels[0], self.levels[-1])

    @torch.no_grad()
    def clip(self, weight: Tensor) -> Tensor:
        """A float32 weight such that quantizing it gives no code that is not in use."""
        if self.levels is None:
            return weight
        rows, scale = to_groups(weight, self.spec, self.axis), self.safe_scale().reshape(-1, 1)
        return from_groups(nearest_level(rows * (1.0 / scale), self.levels) * scale, weight.shape, self.spec, self.axis)

    @property
    def waits(self) -> bool:
        """Whether the first range of a learned scale is still to be set, and not by a forward pass: FSDP2 would forget it."""
        return self.learned and not self.has_range and is_managed(self)

    def _takes_part(self) -> bool:
        """Whether what passes now is to be observed."""
        if self.is_weight:
            return self.quantizing and not self.learned
        if self.learned and self.quantizing and self.has_range:
            return False
        # a checkpointed block runs a second time in the backward pass, with the ranges of the first
        return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1

    def widen(self, bits: int) -> bool:
        """From now on have at least so many bits; what this changes has a range of another width until `renew`.

        Args:
            bits: `NARROWEST`: its own.

        Returns:
            whether it has another width than before.
        """
        spec = widened(self.final_spec, bits)
        changes, self.spec = spec.bits != self.spec.bits, spec
        if not spec.dynamic:
            self.observer.spec = spec
        return changes

    @torch.no_grad()
    def renew(self) -> None:
        """The range of an activation for a new width: from what was observed; one that has learned starts from the next batch."""
        if self.spec.dynamic:
            return
        if (self.learned and self.quantizing) or not self.observer.has_data:
            self.reset_parameters()
            return
        self._stale = True
        self.update_qparams()

    def safe_scale(self) -> Tensor:
        """The scale in use: a learned one may have crossed zero, and its magnitude counts."""
        return self.scale.abs().clamp(min=MIN_SCALE) if self.learned else self.scale

    def require_range(self) -> None:
        if not self.has_range:
            raise RuntimeError(
                f"{self.name}: no range was ever observed, so it cannot be quantized. Calibrate on data that reaches this module, "
                f"or leave the module in float with Recipe(ignore=[...])"
            )

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take `x` into the range. Raises ValueError naming the tensor if it holds nan or inf."""
        if self.spec.dynamic:
            return
        if self.is_weight:
            self.set_qparams(*self.measure(x))
        elif x.numel() or self.observer.reduce is not None:  # other ranks may have values
            rows = to_groups(x.detach(), self.spec, self.axis) if x.numel() else x.detach().reshape(1, 0)
            with self._named():
                self.observer.update(rows)
            self._stale = True
            if torch.compiler.is_compiling() and self.quantizing and not self.learned:  # `update_qparams` looks at what was seen
                self.set_qparams(*calc_qparams(*self.observer.range(), self.spec))
                self._stale = False

    def _observe_and_quantize(self, x: Tensor) -> Tensor | None:
        """Both in one call, if the C library has it and `x` is finite; else nothing is done."""
        momentum = plain_momentum(self.observer)
        if momentum is None or not self.quantizing or self.learned or not x.numel() or self.levels is not None:
            return None
        layout = native_layout(x, self.spec, self.axis)
        if layout is None or not layout.measurable or layout.scales != self.scale.numel() or type(self.scale) is not Tensor:
            return None
        from lightning_quant.kernels.cpu_fake_quant import NotFinite, observed_fake_quantize

        seen = None if self.is_weight else (self.observer.min_val, self.observer.max_val, momentum)
        try:
            quantized, scale, zero_point = observed_fake_quantize(x, layout, seen)
        except NotFinite:
            return None  # `observe` tells the whole story
        with torch.no_grad():
            self.scale.copy_(scale.view(self.scale.shape))
            self.zero_point.copy_(zero_point.view(self.scale.shape))
        if self._stale or not self.has_range:
            self.has_range, self._stale = True, False
        return quantized

    @torch.no_grad()
    def measure(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The qparams of a weight as it is now; nothing is kept. Raises ValueError naming it if it holds nan or inf."""
        rows = to_groups(weight.detach(), self.spec, self.axis)
        with self._named():
            low, high = self.observer.measure(rows, lambda: to_groups(torch.ones_like(weight), self.spec, self.axis))
        scale, zero_point = calc_qparams(low, high, self.spec)
        if self.levels is not None:
            scale = refit_scale(rows, scale, self.levels, counts=to_groups(torch.ones_like(weight), self.spec, self.axis))
        return scale.reshape(self.scale.shape), zero_point.reshape(self.zero_point.shape)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"{self.name}: {error}, so its range is undefined. Check the data and the weights up to this module, "
                f"or leave it in float with Recipe(ignore=[...])"
            ) from None

    @torch.no_grad()
    def update_qparams(self) -> None:
        """Scale and zero point from what was observed since the last time; a learned scale is not touched again."""
        if self._stale and self.observer.has_data:
            self.set_qparams(*calc_qparams(*self.observer.range(), self.spec))
        self._stale = False

    @torch.no_grad()
    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Give it a scale and a zero point, of as many elements as its own."""
        if self.learned and is_managed(self) and not isinstance(self.scale, DTensor):
            raise RuntimeError(f"{self.name}: FSDP2 forgets a range that is set within a forward pass: train it with QATCallback")
        put(self.scale, scale.reshape(self.scale.shape))
        put(self.zero_point, zero_point.reshape(self.zero_point.shape))
        self.has_range = True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """No range: also called by Lightning when tensors that were on the meta device become real."""
        if self.spec.dynamic:
            return
        for value in (self.scale, self.zero_point):
            value.zero_()
        self.observer.reset()
        self.has_range = self._stale = False

    def qparams(self) -> tuple[Tensor, Tensor]:
        """The frozen float32 scale and int32 zero point; raises RuntimeError if there is no range."""
        if self._stale:
            self.update_qparams()
        self.require_range()
        qmin, qmax = qrange(self.spec)
        zero_point = self.zero_point.detach().round().clamp(qmin, qmax) if self.spec.is_int else self.zero_point
        return self.safe_scale().detach().clone(), zero_point.to(torch.int32).clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        return super()._apply(keep_fp32(fn), recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.spec.dynamic:
            return
        local_metadata, strict, missing_keys = args[0], args[1], args[2]
        if not any(key.startswith(prefix) for key in state_dict):
            # a float checkpoint: start without a range, to be observed anew
            self.reset_parameters()
            return
        before = len(missing_keys)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args[3:])
        if len(missing_keys) == before:
            self.has_range = bool((whole(self.scale) != 0).all())
            # the observer may have seen more than the scale was made from
            self._stale = not self.is_weight and not (self.learned and self.has_range)

    def extra_repr(self) -> str:
        return f"{self.spec.label}{', learned' * self.learned}, observing={self.observing}, quantizing={self.quantizing}"
