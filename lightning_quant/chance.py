"""Which differences between two data sets chance explains, sample by sample: exchangeable ones differ, too."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.samples import Samples
from lightning_quant.watching import Range, Seen, half_width

# how improbable a difference by chance must be, over all tests of a kind together
ALPHA = 0.01
# how far out of a range is worth a word, in halves of the range's width
MATERIAL = 0.05
# how much more is clipped than in calibration to be worth a word, as a share of the values
MATERIAL_SHARE = 1e-3


def chance_of_more(count: int, of: int, base_count: int, base_of: int) -> float:
    """The chance that as many of `of` or more have a property, if both sets are drawn alike: Fisher's exact test, one-sided.

    Args:
        count, of: how many of how many samples have it.
        base_count, base_of: the same of the set that is compared with.

    Example:
        >>> round(chance_of_more(3, 4, 0, 4), 4), chance_of_more(0, 4, 3, 4)
        (0.0714, 1.0)
    """
    if count == 0 or base_of == 0:
        return 1.0
    total, everything = count + base_count, of + base_of

    def choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    whole = choose(everything, total)
    ways = [choose(of, k) + choose(base_of, total - k) - whole for k in range(max(count, total - base_of), min(total, of) + 1)]
    return min(1.0, sum(map(math.exp, ways)))


def chance_of_as_far(farthest: float, of: int, base: Tensor, resolution: float) -> float:
    """The chance that one of `of` samples lies as far out as `farthest`, if they are drawn like `base`.

    The tail of `base` (its largest eighth) is taken as exponential, and where that explains more as a power law (Hill 1975, "A
    simple general approach to inference about the tail of a distribution"); that few values estimate its scale counts, too.

    Args:
        base: `[samples]`, the values of the set that is compared with.
        resolution: the smallest scale of a tail that counts.

    Example:
        >>> base = torch.linspace(0, 1, 64)
        >>> chance_of_as_far(1.1, 64, base, 0.01) > 0.1, chance_of_as_far(9.0, 64, base, 0.01) < 1e-3
        (True, True)
    """
    if len(base) < 2:
        return 1.0
    count = max(1, len(base) // 8)
    top = base.double().sort(descending=True).values[: count + 1]
    if farthest <= top[0]:
        return 1.0
    start = top[count].item()

    def tail(distance: float, scale: float) -> float:
        return (1 + distance / (count * scale)) ** -count

    found = tail(farthest - start, max((top[:count] - start).mean().item(), resolution))
    if start > 0:
        scale = (top[:count] / start).log().mean().item()
        found = max(found, tail(math.log(farthest / start), max(scale, resolution / top[0].item())))
    return min(1.0, found * of * (count + 1) / (len(base) + 1))


@dataclass(frozen=True)
class Units:
    """A layer's records as one table, in order: of samples, or of batches where samples cannot be told apart.

    Args:
        table: `[units, 4]`, as in `Seen`.
        first, count: `[units]`, the number of the first sample that each stands for, and of how many.
    """

    table: Tensor
    first: Tensor
    count: Tensor

    @classmethod
    def of(cls, seen: Seen, data: Samples) -> Units:
        first, count = [], []
        for batch, rows in seen.records.items():
            start, size = data.starts[batch], max(data.sizes[batch], 1)
            apart = len(rows) == size
            first.append(start + torch.arange(size) if apart else torch.tensor([start]))
            count.append(torch.full((len(rows),), 1 if apart else size))
        return cls(torch.cat(list(seen.records.values())), torch.cat(first), torch.cat(count))

    def select(self, chosen: Tensor) -> Units:
        return Units(self.table[chosen], self.first[chosen], self.count[chosen])

    def is_in(self, group: Tensor) -> Tensor:
        """Which units lie in a group of samples (`[samples]`, bool) as a whole."""
        before = torch.cat([torch.zeros(1, dtype=torch.int64), group.long().cumsum(0)])
        return before[self.first + self.count] - before[self.first] == self.count

    def leaves(self, limits: Range) -> Tensor:
        return (self.table[:, 0] < limits[0]) | (self.table[:, 1] > limits[1])

    def share(self) -> float:
        """Of their values, how many lie outside the range."""
        return (self.table[:, 2].sum() / self.table[:, 3].sum().clamp(min=1)).item()

    def split_share(self) -> float | None:
        """The share of units that leave the range of every second other unit; None if there is one only."""
        if len(self.table) < 2:
            return None
        left, halves = 0, (self.table[::2], self.table[1::2])
        for mine, other in (halves, halves[::-1]):
            left += int(((mine[:, 0] < other[:, 0].min()) | (mine[:, 1] > other[:, 1].max())).sum())
        return left / len(self.table)


def overshoot(units: Units, base: Units, limits: Range) -> float:
    """How far units reach beyond the range and beyond all of `base`, in halves of the range's width."""
    low = min(limits[0], base.table[:, 0].min().item()) - units.table[:, 0].min().item()
    high = units.table[:, 1].max().item() - max(limits[1], base.table[:, 1].max().item())
    return max(low, high, 0.0) / half_width(limits)


def leaves_range(units: Units, base: Units, limits: Range, tests: int, of: int | None = None) -> bool:
    """Whether units leave the range by an amount that matters, and more often or farther than chance explains.

    Args:
        base: of calibration; by chance, units are drawn like these.
        tests: how many such tests are made in all.
        of: how many units these were picked from, as the longest, say, which by chance lie far out; by default they are all.
    """
    of = of or len(units.table)
    if overshoot(units, base, limits) < MATERIAL and units.share() < base.share() + MATERIAL_SHARE:
        return False
    chances = []
    for values, known in ((units.table[:, 1], base.table[:, 1]), (-units.table[:, 0], -base.table[:, 0])):
        beyond = int((values > known.max()).sum())
        chances.append(chance_of_more(beyond, of, 0, len(known)))
        chances.append(chance_of_as_far(values.max().item(), of, known, 0.01 * half_width(limits)))
    chances.append(chance_of_more(int(units.leaves(limits).sum()), of, int(base.leaves(limits).sum()), len(base.table)))
    return len(chances) * min(chances) * tests < ALPHA


def channels_beyond(beyond: Tensor, of: int, base_of: int, tests: int) -> tuple[int, ...]:
    """The channels that leave their range in calibration in more of `of` samples than chance explains.

    Args:
        beyond: `[channels]`: in how many of the `of` samples each does; in none of calibration's `base_of`.
        tests: how many such tests are made in all.
    """
    enough = {count: chance_of_more(count, of, 0, base_of) * tests < ALPHA for count in beyond.unique().tolist()}
    return tuple(channel for channel, count in enumerate(beyond.tolist()) if enough[count])
