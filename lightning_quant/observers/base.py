"""What observers share, and the two whose state is a range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_quant.numerics import holds
from lightning_quant.spec import QuantSpec

OBSERVERS: dict[str, type[Observer]] = {}

Range = tuple[Tensor, Tensor]
# reduce(tensor, op) merges a tensor over ranks in place; op is one of min, max, sum
Reduce = Callable[[Tensor, str], None]


def register_observer(name: str) -> Callable[[type[Observer]], type[Observer]]:
    """Add a class to `OBSERVERS`."""

    def add(cls: type[Observer]) -> type[Observer]:
        OBSERVERS[name] = cls
        return cls

    return add


def finite_range(rows: Tensor, reduce: Reduce | None = None) -> Range:
    """The range of each row, over all ranks if `reduce` is given; without any value it is [inf, -inf]."""
    if rows.shape[1]:
        low, high = (end.float() for end in torch.aminmax(rows, dim=1))
    else:
        high = torch.full((rows.shape[0],), -torch.inf, device=rows.device)
        low = -high
    if reduce is not None:
        # one maximum of both ends; nan would be lost in it, inf is not
        ends = torch.cat([-low, high])
        ends = torch.where(ends.isnan(), torch.inf, ends)
        reduce(ends, "max")
        low, high = -ends[: len(low)], ends[len(low) :]
    if not holds(((low > -torch.inf) & (high < torch.inf)).all(), "values are nan or inf"):
        bad = rows.numel() - int(torch.isfinite(rows).sum())
        raise ValueError(f"{bad} of {rows.numel()} values are nan or inf" + " (they are on another rank)" * (bad == 0))
    return low, high


class Observer(nn.Module):
    """The smallest and the largest value seen; the state that all observers share.

    Args:
        spec: the tensor's spec, for observers that weigh quantization error.
        groups: rows of `to_groups`, one range each.
    """

    reductions: ClassVar[dict[str, str]] = {"min_val": "min", "max_val": "max"}
    min_val: Tensor
    max_val: Tensor
    # if set, `update` takes in the batches of all ranks at once; every rank must then call it equally often
    reduce: Reduce | None = None

    def __init__(self, spec: QuantSpec, groups: int) -> None:
        super().__init__()
        self.spec = spec
        # without groups there is no state, only `measure`
        self.register_buffer("min_val", torch.full((groups,), torch.inf, dtype=torch.float32), persistent=groups > 0)
        self.register_buffer("max_val", torch.full((groups,), -torch.inf, dtype=torch.float32), persistent=groups > 0)

    @property
    def has_data(self) -> bool:
        return bool((self.min_val <= self.max_val).all())

    @torch.no_grad()
    def reset(self) -> None:
        self.min_val.fill_(torch.inf)
        self.max_val.fill_(-torch.inf)

    def reset_parameters(self) -> None:
        """Called by Lightning when buffers that were on the meta device become real."""
        self.reset()

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Take in `[groups, elements]`. Raises ValueError if any value is nan or inf."""
        self._take(*finite_range(rows, self.reduce))

    def _take(self, low: Tensor, high: Tensor) -> None:
        """Take in a batch's range."""
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))

    def range(self) -> Range:
        """The range to quantize, `[groups]` each."""
        return self.min_val, self.max_val

    def measure(self, rows: Tensor, counts: Callable[[], Tensor]) -> Range:
        """The range of values at hand, without touching the state.

        Args:
            rows: `[groups, elements]`, finite.
            counts: makes a tensor of the same shape, how often each value occurs (0 for padding); called only if it matters.
        """
        return finite_range(rows)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:  # a float checkpoint, or one that was made with another observer
            self.reset()

    @torch.no_grad()
    def all_reduce(self, reduce: Reduce) -> None:
        """Merge the state of all ranks, who took in batches of their own."""
        for name, op in self.reductions.items():
            reduce(getattr(self, name), op)


@register_observer("minmax")
class MinMaxObserver(Observer):
    """The whole range seen. Independent of how the data is split into batches."""


@register_observer("moving_average")
class MovingAverageObserver(Observer):
    """An exponential moving average of each batch's range (Jacob et al. 2018, arXiv:1712.05877, section 3.1).

    Args:
        momentum: the weight of the newest batch. The result depends on the batches' order and size by definition.
    """

    reductions: ClassVar[dict[str, str]] = {"min_val": "sum", "max_val": "sum"}

    def __init__(self, spec: QuantSpec, groups: int, momentum: float = 0.01) -> None:
        super().__init__(spec, groups)
        if not 0 < momentum <= 1:
            raise ValueError(f"moving_average momentum={momentum}: must be in (0, 1]")
        self.momentum = momentum

    def _take(self, low: Tensor, high: Tensor) -> None:
        for average, value in ((self.min_val, low), (self.max_val, high)):
            moved = torch.where(average.isinf(), value, average + self.momentum * (value - average))
            average.copy_(torch.where(value.isinf(), average, moved))  # a batch without values changes nothing

    @torch.no_grad()
    def all_reduce(self, reduce: Reduce) -> None:
        seen = (self.min_val <= self.max_val).to(self.min_val.dtype)  # a rank without data has no say
        ranks = seen.clone()
        reduce(ranks, "sum")
        for average, empty in ((self.min_val, torch.inf), (self.max_val, -torch.inf)):
            total = torch.where(seen > 0, average, 0.0)
            reduce(total, self.reductions["min_val"])
            average.copy_(torch.where(ranks > 0, total / ranks, empty))


def plain_momentum(observer: Observer) -> float | None:
    """The momentum of an observer whose state is the range of this process's batches, 0 for all that was seen; None of others."""
    if observer.reduce is not None:
        return None
    if type(observer) is MovingAverageObserver:
        return observer.momentum
    return 0.0 if type(observer) is MinMaxObserver else None
