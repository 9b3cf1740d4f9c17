"""Observers whose state is a histogram: ranges with the least error, and where learned scales start."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.numerics import MIN_SCALE, calc_qparams, dequantize_rows, max_value, qrange, quantize_rows
from lightning_quant.observers.base import Observer, Range, Reduce, finite_range, register_observer
from lightning_quant.spec import QuantSpec

_LARGEST = torch.finfo(torch.float32).max


class HistogramObserver(Observer):
    """A histogram whose bins are aligned to 0 and as wide as a power of two.

    When a value falls outside, neighbouring bins merge, which loses nothing: the histogram is that of the whole data at the
    final width, whatever the batches, ranks and their order. Memory: `BINS` int64 a group.
    """

    BINS = 4096
    MIN_EXPONENT = -100  # keeps the bin width a normal float32

    reductions: ClassVar[dict[str, str]] = {"min_val": "min", "max_val": "max", "counts": "sum"}
    counts: Tensor
    exponent: Tensor

    def __init__(self, spec: QuantSpec, groups: int) -> None:
        super().__init__(spec, groups)
        self.register_buffer("counts", torch.zeros(groups, self.BINS, dtype=torch.int64), persistent=groups > 0)
        self.register_buffer("exponent", torch.full((groups,), self.MIN_EXPONENT, dtype=torch.int32), persistent=groups > 0)

    @torch.no_grad()
    def reset(self) -> None:
        super().reset()
        self.counts.zero_()
        self.exponent.fill_(self.MIN_EXPONENT)

    def _widen(self, exponent: Tensor) -> None:
        """Merge bins until they span +-2^exponent."""
        shift = (exponent - self.exponent).clamp(min=0)
        if not bool(shift.any()):
            return
        half = self.BINS // 2
        old = torch.arange(self.BINS, device=shift.device) - half
        new = (old >> shift.clamp(max=31)[:, None].long()) + half
        self.counts.copy_(torch.zeros_like(self.counts).scatter_add_(1, new, self.counts))
        self.exponent.add_(shift)

    def _width(self) -> Tensor:
        # the exponent of the whole span may be that of inf
        return torch.ldexp(torch.ones_like(self.min_val), self.exponent - (self.BINS // 2).bit_length() + 1)[:, None]

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        low, high = finite_range(rows, self.reduce)
        self._take(low, high)
        rows = rows.float()
        largest = torch.where(low <= high, torch.maximum(low.abs(), high.abs()), 0.0)
        # frexp: largest < 2^exponent
        exponent = torch.where(largest > 0, torch.frexp(largest).exponent, self.MIN_EXPONENT)
        self._widen(exponent.to(torch.int32).clamp(min=self.MIN_EXPONENT))
        index = torch.floor(rows / self._width()).long() + self.BINS // 2
        index += torch.arange(rows.shape[0], device=rows.device)[:, None] * self.BINS
        counts = torch.bincount(index.flatten(), minlength=self.counts.numel()).view_as(self.counts)
        if self.reduce is not None:
            self.reduce(counts, "sum")
        self.counts += counts

    def range(self) -> Range:
        used = self.counts.any(dim=0)  # most bins of a heavy-tailed tensor are empty
        centers = (torch.arange(self.BINS, device=used.device)[used] + 0.5 - self.BINS // 2) * self._width()
        values = torch.minimum(torch.maximum(centers, self.min_val[:, None]), self.max_val[:, None])
        return self._search(values, self.counts[:, used], self.min_val, self.max_val)

    def measure(self, rows: Tensor, counts: Callable[[], Tensor]) -> Range:
        return self._search(rows.float(), counts(), *finite_range(rows))

    def _search(self, values: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> Range:
        """The best range within [low, high] for `values` `[groups, n]` that occur `counts` times each."""
        raise NotImplementedError

    @torch.no_grad()
    def all_reduce(self, reduce: Reduce) -> None:
        widest = self.exponent.clone()
        reduce(widest, "max")
        self._widen(widest)
        super().all_reduce(reduce)


@register_observer("percentile")
class PercentileObserver(HistogramObserver):
    """Cut the tails: from the (100 - p)-th to the p-th percentile, to a 2048th of the largest magnitude.

    Args:
        percentile: p, in (50, 100].
    """

    def __init__(self, spec: QuantSpec, groups: int, percentile: float = 99.99) -> None:
        super().__init__(spec, groups)
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile={percentile}: must be in (50, 100]")
        self.percentile = percentile

    def _search(self, values: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> Range:
        values, order = values.sort(dim=1)
        cumulative = counts.to(torch.int64).gather(1, order).cumsum(1)
        total = cumulative[:, -1:].double()
        # the smallest value that at least p % of the data does not exceed, and its mirror image
        upper = (total * (self.percentile / 100)).ceil().long().clamp(min=1)
        lower = (total * (1 - self.percentile / 100)).floor().long() + 1
        index = torch.searchsorted(cumulative, torch.cat([lower, upper], dim=1)).clamp(max=values.shape[1] - 1)
        found = values.gather(1, index)
        return torch.maximum(found[:, 0], low), torch.minimum(found[:, 1], high)


def _shrinks(steps: int) -> list[float]:
    return [1 - step / steps for step in range(steps)]


@register_observer("mse")
class MSEObserver(HistogramObserver):
    """The range with the least quantization error, by grid search (Nagel et al. 2021, arXiv:2106.08295, section 3.1).

    Both ends shrink together, then an asymmetric range's upper and lower end each on its own.

    Args:
        norm: the error is the mean of |x - q(x)|^norm.
        steps: the grid is 1, 1 - 1/steps, ... of the full range.
    """

    def __init__(self, spec: QuantSpec, groups: int, norm: float = 2.0, steps: int = 100) -> None:
        super().__init__(spec, groups)
        if norm <= 0 or steps < 1:
            raise ValueError(f"mse norm={norm}, steps={steps}: must be positive")
        self.norm, self.steps = norm, steps

    def _error(self, values: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> Tensor:
        qparams = calc_qparams(low, high, self.spec)
        error = dequantize_rows(quantize_rows(values, *qparams, self.spec), *qparams, self.spec).sub_(values).abs_()
        return (error.pow_(self.norm) * counts).double().sum(dim=1)

    def _search(self, values: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> Range:
        from lightning_quant.kernels.native import fake

        low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
        if self.norm == 2:
            found = fake.search(values, counts.float(), low, high, self.spec, _shrinks(self.steps)[1:])
            if found is not None:
                return found
        best = self._error(values, counts, low, high)
        for ends in ((True, True), (False, True), (True, False))[: 1 if self.spec.symmetric else 3]:
            full_low, full_high = low, high
            for shrink in _shrinks(self.steps)[1:]:
                try_low = full_low * shrink if ends[0] else full_low
                try_high = full_high * shrink if ends[1] else full_high
                error = self._error(values, counts, try_low, try_high)
                better = error < best
                best = torch.where(better, error, best)
                low, high = torch.where(better, try_low, low), torch.where(better, try_high, high)
        return low, high


@register_observer("kl")
class KLObserver(HistogramObserver):
    """The range whose quantized distribution is closest in entropy (Migacz 2017, "8-bit inference with TensorRT").

    Candidates shrink the range; the reference distribution P keeps the clipped mass in its outermost bins, Q spreads each
    code's mass evenly over the occupied bins it covers; the least KL(P || Q) wins.

    Args:
        steps: the grid is 1, 1 - 1/steps, ... of the full range.
    """

    CELLS = 2048

    def __init__(self, spec: QuantSpec, groups: int, steps: int = 100) -> None:
        super().__init__(spec, groups)
        if steps < 1:
            raise ValueError(f"kl steps={steps}: must be positive")
        self.steps = steps

    def _divergence(self, mass: Tensor, centers: Tensor, low: Tensor, high: Tensor) -> Tensor:
        inside = ((centers >= low[:, None]) & (centers <= high[:, None])).to(mass.dtype)
        codes = quantize_rows(centers, *calc_qparams(low, high, self.spec), self.spec)
        index = (codes.view(torch.uint8) if codes.is_floating_point() else codes.to(torch.int64) + 128).long()
        kept = mass * inside
        below = (mass * (centers < low[:, None])).sum(1, keepdim=True)
        above = (mass * (centers > high[:, None])).sum(1, keepdim=True)
        edges = inside.cumsum(1)
        p = kept + below * ((edges == 1) & (inside > 0)) + above * ((edges == edges[:, -1:]) & (inside > 0))
        bins = mass.new_zeros(mass.shape[0], 512)
        occupied = bins.scatter_add(1, index, (kept > 0).to(mass.dtype))
        q = bins.scatter_add(1, index, kept) / occupied.clamp(min=1)
        q = q.gather(1, index) * (kept > 0)
        p, q = p / p.sum(1, keepdim=True).clamp(min=1e-30), q / q.sum(1, keepdim=True).clamp(min=1e-30)
        # mass where Q has none costs as much as a very unlikely event, not infinitely much
        return torch.where(p > 0, p * (p / q.clamp(min=1e-10)).log(), 0.0).sum(1)

    def _search(self, values: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> Range:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        if self.spec.symmetric and self.spec.signed:
            high = torch.maximum(-low, high)
            low = -high
        span = (high - low).clamp(min=1e-30)[:, None]
        cell = ((values - low[:, None]) / span * self.CELLS).long().clamp(0, self.CELLS - 1)
        mass = torch.zeros(values.shape[0], self.CELLS, dtype=torch.float64, device=values.device)
        mass.scatter_add_(1, cell, counts.double())
        centers = low[:, None] + span * ((torch.arange(self.CELLS, device=values.device) + 0.5) / self.CELLS)
        best = torch.full_like(mass[:, 0], torch.inf)
        best_low, best_high = low, high
        for shrink in _shrinks(self.steps):
            divergence = self._divergence(mass, centers, low * shrink, high * shrink)
            better = divergence < best
            best = torch.where(better, divergence, best)
            best_low = torch.where(better, low * shrink, best_low)
            best_high = torch.where(better, high * shrink, best_high)
        return best_low, best_high


def _moments(values: Tensor, counts: Tensor, *powers: int) -> list[Tensor]:
    """Means of powers of values relative to the largest magnitude, which is the first of what returns; float64 `[groups]` each."""
    largest = values.double().abs().amax(1).clamp(min=MIN_SCALE)
    relative, counts = values.double() / largest[:, None], counts.double()
    total = counts.sum(1).clamp(min=1)
    means = [((relative.abs() if power == 0 else relative.pow(power)) * counts).sum(1) / total for power in powers]
    return [largest, *means]


@register_observer("lsq")
class LSQObserver(HistogramObserver):
    """LSQ's first scale, `2 * mean|v| / sqrt(q_max)` (Esser et al. 2020, arXiv:1902.08153, section 2.1).

    An asymmetric range of values that are never negative has the codes of LSQ's unsigned data; else 0 is in its middle. Formats
    that are no integers keep their whole range.
    """

    def _search(self, values: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> Range:
        if not self.spec.is_int:
            return low, high
        qmin, qmax = qrange(self.spec)
        largest, mean = _moments(values, counts, 0)
        unsigned = (low >= 0) & (not self.spec.signed or not self.spec.symmetric)
        codes = torch.where(unsigned, float(qmax - qmin), float((qmax - qmin) // 2)).double()
        spanned = torch.where(unsigned, codes, (qmax - qmin) / 2)
        end = (2 * mean / codes.sqrt() * spanned * largest).clamp(max=_LARGEST).float()
        return torch.where(unsigned, 0.0, -end), end


@register_observer("sigma")
class SigmaObserver(HistogramObserver):
    """Three standard deviations around the mean, as LSQ+ starts weights (Bhalgat et al. 2020, arXiv:2004.09576, section 3.2).

    A symmetric scale is `max(|mean - 3 sigma|, |mean + 3 sigma|) / 2^(bits - 1)`; an asymmetric range ends where the values do.
    """

    def _search(self, values: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> Range:
        largest, mean, square = _moments(values, counts, 1, 2)
        spread = 3 * (square - mean.square()).clamp(min=0).sqrt()
        ends = [((mean + side * spread) * largest).clamp(-_LARGEST, _LARGEST).float() for side in (-1, 1)]
        if not self.spec.symmetric:
            return torch.maximum(torch.minimum(ends[0], high), low), torch.minimum(torch.maximum(ends[1], low), high)
        codes = 2.0 ** (self.spec.bits - self.spec.signed) if self.spec.is_int else max_value(self.spec)
        end = torch.maximum(ends[0].abs(), ends[1].abs()) * (max_value(self.spec) / codes)
        return -end, end
