"""What is known of a data set's samples: labels, lengths, sizes and tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LABELS = ("labels", "label", "targets", "target", "y")
_NO_TOKENS = (*_LABELS, "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Sample:
    """One input of a data set and what is known of it; prints as its name.

    Args:
        batch: its batch's number in its dataloader, from 0.
        row: its index in the batch; None stands for the whole batch.
        label: its class, of batches `(x, y)` with an integer `y` of one dimension.
        length: its tokens: the sum of its `attention_mask`, else the size of dimension 1 of integer inputs.
        size: the shape of a float input without the batch, such as `3x32x32`.
        new_tokens: whether it has tokens that calibration never had.

    Example:
        >>> print(Sample(3, 1, label=7, size="3x32x32"))
        batch 3, row 1 (class 7)
    """

    batch: int
    row: int | None
    dataloader: int = 0
    label: int | None = None
    length: int | None = None
    size: str = ""
    new_tokens: bool = False

    def __str__(self) -> str:
        where = f"dataloader {self.dataloader}, " * (self.dataloader > 0) + f"batch {self.batch}"
        where += "" if self.row is None else f", row {self.row}"
        known = [f"class {self.label}"] * (self.label is not None) + [f"length {self.length}"] * (self.length is not None)
        return where + (f" ({', '.join(known)})" if known else "")


@dataclass(frozen=True)
class _Parts:
    """The tensors of a batch that tell something of its samples."""

    size: int
    x: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None


def _is_int(value: Any, dims: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == dims and not value.is_floating_point() and value.dtype != torch.bool


def _parts(batch: Any) -> _Parts:
    named: dict[str, Any] = {}
    items: list[Any] = []
    first = batch[0] if isinstance(batch, Sequence) and len(batch) and not isinstance(batch, str) else batch
    if isinstance(first, Mapping):
        named = {str(key).lower(): value for key, value in first.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        items = list(batch)
    elif isinstance(batch, Tensor):
        items = [batch]
    others = [key for key in named if key not in _NO_TOKENS]
    inputs = [named[key] for key in sorted(others, key=lambda key: key != "input_ids")] + items[:1]
    x = next((value for value in inputs if isinstance(value, Tensor) and value.dim()), None)
    if x is None:
        return _Parts(0)
    tokens = next((value for value in inputs if _is_int(value, 2) and len(value) == len(x)), None)
    mask = named.get("attention_mask")
    told = [named[key] for key in _LABELS if key in named] + items[1:]
    labels = next((value for value in told if _is_int(value, 1) and len(value) == len(x)), None)
    fits = tokens is not None and isinstance(mask, Tensor) and mask.shape == tokens.shape
    return _Parts(len(x), x, tokens, mask.bool() if fits else None, labels)  # type: ignore[union-attr]


def part_of(first: int, rows: int, parts: int) -> Tensor:
    """Which part of its set each of `rows` samples belongs to, the first of which has the number `first`: they take turns."""
    return (first + torch.arange(rows)) % parts


class Samples:
    """What the batches of one data set hold, collected batch by batch. Memory: a small record a sample, and the vocabulary seen.

    Args:
        known: calibration's, when this is the set that is compared with it.
    """

    def __init__(self, known: Samples | None = None) -> None:
        self.samples: list[Sample] = []
        self.starts: list[int] = []  # the number of each batch's first sample
        self.sizes: list[int] = []  # 0: a batch without a tensor
        self.length: int | None = None  # of the latest batch, padding included
        self.mask: Tensor | None = None  # of the latest batch, `[samples, length]`: True where a token is no padding
        self.padded = False  # whether lengths are those of whole batches, without an attention mask
        self.tokens: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        self._known = None if known is None else torch.tensor(sorted(known.all_tokens()), dtype=torch.int64)

    def all_tokens(self) -> Counter[int]:
        """How often each token occurs."""
        return self.tokens[0] + self.tokens[1]

    def add(self, batch: Any, index: int, dataloader: int = 0) -> None:
        """Take in a batch, before the model does."""
        parts = _parts(batch)
        self.starts.append(len(self.samples))
        self.sizes.append(parts.size)
        labels = [None] * parts.size if parts.labels is None else parts.labels.tolist()
        lengths: list[Any] = [None] * parts.size
        new = [False] * parts.size
        self.length = parts.x.shape[1] if parts.x is not None and parts.x.dim() > 1 else None
        self.mask = None if parts.mask is None or parts.mask.all() else parts.mask
        if parts.tokens is not None:
            self.length = parts.tokens.shape[1]
            self.padded |= parts.mask is None
            lengths = [self.length] * parts.size if parts.mask is None else parts.mask.sum(dim=1).tolist()
            new = self._count(parts.tokens.cpu(), parts.mask, part_of(self.starts[-1], parts.size, 2))
        is_float = parts.x is not None and parts.x.is_floating_point()
        size = "x".join(map(str, parts.x.shape[1:])) if is_float else ""  # type: ignore[union-attr]
        self.samples += [
            Sample(index, row, dataloader, labels[row], lengths[row], size, new[row]) for row in range(parts.size)
        ] or [Sample(index, None, dataloader)]

    def _count(self, tokens: Tensor, mask: Tensor | None, half: Tensor) -> list[bool]:
        """Count tokens; returns which rows have tokens that are not known."""
        valid = tokens >= 0 if mask is None else (tokens >= 0) & mask.to(tokens.device)
        for which, counter in enumerate(self.tokens):
            rows = half == which
            values, counts = torch.unique(tokens[rows][valid[rows]], return_counts=True)
            counter.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if self._known is None:
            return [False] * len(tokens)
        return (valid & ~torch.isin(tokens, self._known.to(tokens.dtype))).any(dim=1).tolist()

    def units(self) -> list[Sample]:
        """One sample a batch where a length or size is that of the whole batch, else all of them."""
        return [self.samples[start] for start in self.starts]


@dataclass(frozen=True)
class TokenCoverage:
    """How much of the validation set's text calibration knows.

    Args:
        unseen: the share of its tokens (0..1) that calibration never had.
        split_unseen: the same of one half of calibration against the other.
        most_frequent: (token, count) of those that calibration never had, most frequent first, ten at most.
    """

    unseen: float
    split_unseen: float
    most_frequent: tuple[tuple[int, int], ...]

    @property
    def is_new(self) -> bool:
        """Whether the share is more than what half of calibration lacks of the other half, and more than a hundredth."""
        return self.unseen > max(0.01, 2 * self.split_unseen)


def token_coverage(calibration: Samples, validation: Samples) -> TokenCoverage | None:
    """Compare tokens; None if a set has none."""
    known, found = calibration.all_tokens(), validation.all_tokens()
    if not known or not found:
        return None
    one, other = calibration.tokens
    new = Counter({token: count for token, count in found.items() if token not in known})
    missing = sum(one[token] for token in one if token not in other) + sum(other[token] for token in other if token not in one)
    return TokenCoverage(new.total() / found.total(), missing / known.total(), tuple(new.most_common(10)))


@dataclass(frozen=True)
class DataSummary:
    """One data set.

    Args:
        lengths: (shortest, mean, longest) in tokens; None without tokens.
        sizes: of float inputs -> how many.
        classes: label -> how many.
        tokens: how many, padding excluded where a mask tells it.
    """

    name: str
    batches: int
    samples: int
    lengths: tuple[int, float, int] | None
    sizes: dict[str, int]
    classes: dict[int, int]
    tokens: int

    @classmethod
    def of(cls, name: str, data: Samples) -> DataSummary:
        lengths = [sample.length for sample in data.samples if sample.length is not None]
        told = (min(lengths), sum(lengths) / len(lengths), max(lengths)) if lengths else None
        sizes = Counter(sample.size for sample in data.samples if sample.size)
        classes = Counter(sample.label for sample in data.samples if sample.label is not None)
        count = data.all_tokens().total()
        return cls(name, len(data.sizes), len(data.samples), told, dict(sizes), dict(sorted(classes.items())), count)
