"""What is kept of a layer's inputs, in bounded memory, and how far apart two such distributions are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_quant.observers import HistogramObserver
from lightning_quant.spec import QuantSpec


class Histogram(HistogramObserver):
    """The histogram of a whole tensor, to be merged and compared: its bins are aligned to those of any other."""

    def __init__(self) -> None:
        super().__init__(QuantSpec(granularity="tensor"), 1)

    @torch.no_grad()
    def merge(self, other: Histogram) -> None:
        aligned = other.aligned(self.exponent)
        self._widen(aligned.exponent)
        self.counts += aligned.counts
        self._take(other.min_val, other.max_val)

    def aligned(self, exponent: Tensor) -> Histogram:
        """A copy at a width that is at least as large."""
        copied = Histogram()
        copied.load_state_dict(self.state_dict())
        copied._widen(exponent)
        return copied

    def distance(self, other: Histogram) -> float:
        """The Wasserstein-1 distance: how far values move on average to make one distribution of the other, in their units."""
        one = self.aligned(other.exponent)
        two = other.aligned(one.exponent)
        return (_apart(one.counts, two.counts) * one._width()).item()


def _apart(one: Tensor, two: Tensor) -> Tensor:
    """The Wasserstein-1 distance of `[..., bins]` counts, in bins."""
    shares = [(counts.double() / counts.sum(-1, keepdim=True)).cumsum(-1) for counts in (one, two)]
    return (shares[0] - shares[1]).abs().sum(-1)


class Distribution:
    """A layer's inputs: a histogram of all values, and each channel's moments. Memory: 32 KiB and 16 bytes a channel."""

    def __init__(self) -> None:
        self.histogram = Histogram()
        self.tokens = 0
        self.sums: Tensor | None = None  # float64 [2, channels]: of values and of their squares

    def add(self, x: Tensor) -> None:
        """Take in `[..., channels]`, on the CPU or a GPU. Raises ValueError if any value is nan or inf."""
        if x.numel() == 0:
            return
        self.histogram.to(x.device).update(x.reshape(1, -1))
        wide = x.flatten(0, -2).double()
        sums = torch.stack([wide.sum(0), wide.square().sum(0)]).cpu()
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens += len(wide)

    def merged(self, other: Distribution) -> Distribution:
        both = Distribution()
        for each in (self, other):
            if each.sums is not None:
                both.histogram.merge(each.histogram.cpu())
                both.sums = each.sums if both.sums is None else both.sums + each.sums
                both.tokens += each.tokens
        return both

    def deviation(self) -> float:
        """The standard deviation of all values."""
        assert self.sums is not None
        mean, square = (self.sums.mean(1) / self.tokens).tolist()
        return max(square - mean**2, 0.0) ** 0.5

    def shift_from(self, base: Distribution, deviation: float) -> tuple[float, float]:
        """How far this is from `base`, in units of `deviation`: Wasserstein-1 of all values, and of the channel that moved most the
        Frechet distance of Gaussians with its mean and standard deviation."""
        unit = max(deviation, 1e-12)
        assert self.sums is not None
        assert base.sums is not None
        moved = _channels_apart(self.sums / self.tokens, base.sums / base.tokens).item()
        return self.histogram.distance(base.histogram) / unit, moved / unit


def _channels_apart(one: Tensor, two: Tensor) -> Tensor:
    """The largest Frechet distance of any channel, of `[..., 2, channels]` means of values and of their squares."""
    means, spreads = [], []
    for moments in (one, two):
        mean, square = moments.unbind(-2)
        means.append(mean)
        spreads.append((square - mean.square()).clamp(min=0).sqrt())
    return ((means[0] - means[1]).square() + (spreads[0] - spreads[1]).square()).sqrt().amax(-1)


def split_shift(parts: Sequence[Distribution], deviation: float) -> tuple[float, float] | None:
    """The largest `shift_from` of any half of the parts from the other half; None if a part is empty."""
    if not all(part.tokens for part in parts):
        return None
    widest = torch.stack([part.histogram.exponent for part in parts]).amax(0)
    aligned = [part.histogram.aligned(widest) for part in parts]
    counts = torch.cat([each.counts for each in aligned]).double()
    sums = torch.stack([part.sums for part in parts if part.sums is not None])
    tokens = torch.tensor([part.tokens for part in parts], dtype=torch.float64)
    halves = torch.zeros(0, len(parts), dtype=torch.float64)
    for chosen in itertools.combinations(range(1, len(parts)), len(parts) // 2 - 1):  # the first part is in the first half
        halves = torch.cat([halves, torch.zeros(1, len(parts), dtype=torch.float64).index_fill_(1, torch.tensor((0, *chosen)), 1)])
    both = []
    for half in (halves, 1 - halves):
        moments = torch.einsum("hp,pmc->hmc", half, sums) / (half @ tokens)[:, None, None]
        both.append((half @ counts, moments))
    (counts_a, moments_a), (counts_b, moments_b) = both
    unit = max(deviation, 1e-12)
    values = _apart(counts_a, counts_b).max().item() * aligned[0]._width().item() / unit
    return values, _channels_apart(moments_a, moments_b).max().item() / unit
