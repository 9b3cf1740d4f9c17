"""What a model's quantized layers get from a data set while it is run: distributions, channels, the extremes of each sample."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_quant.distributions import Distribution
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.nn import PackedModule
from lightning_quant.nn.attention import FakeMultiheadAttention
from lightning_quant.numerics import dequantize_rows, quantize_rows
from lightning_quant.samples import Samples, part_of
from lightning_quant.spec import QuantSpec
from lightning_quant.surgery import fake_modules, packed_modules

Range = tuple[float, float]
# of calibration: its 35 halvings show how much two sets differ by chance
PARTS = 8


# --- what to watch --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """One watched input: an argument of a module.

    Args:
        axis: the channel's dimension, negative.
        packed: the range outside of which a static input is clipped; None: dynamic, or in float.
        batch_dim: the samples' dimension, where the module says so.
    """

    name: str
    module: nn.Module
    argument: int = 0
    keyword: str = "input"
    axis: int = -1
    packed: Range | None = None
    batch_dim: int | None = None

    def pick(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > self.argument:
            return args[self.argument]
        return kwargs.get(self.keyword, next(iter(kwargs.values()), None) if self.argument == 0 else None)


def static_range(spec: QuantSpec, scale: Tensor, zero_point: Tensor) -> Range:
    """Outside of which values are clipped: half a step beyond the grid's ends, and a little for float32 rounding.

    Example:
        >>> static_range(QuantSpec(4, granularity="tensor"), torch.tensor([2.0]), torch.tensor([0]))
        (-17.0002, 15.0002)
    """
    ends = torch.tensor([[-torch.inf, torch.inf]])
    scale, zero_point = scale.detach().cpu(), zero_point.detach().cpu()
    low, high = dequantize_rows(quantize_rows(ends, scale, zero_point, spec), scale, zero_point, spec)[0].tolist()
    step = scale.item() / 2 if spec.is_int else 0.0
    margin = step + 1e-4 * (scale.item() if spec.is_int else high)
    return low - margin, high + margin


def _packed_range(module: PackedModule) -> Range | None:
    scale, zero_point = module.input_args()
    spec = module.scheme.input
    return None if spec is None or scale is None or zero_point is None else static_range(spec, scale, zero_point)


def _fake_range(quantizer: Any) -> Range | None:
    if not isinstance(quantizer, FakeQuantize) or quantizer.spec.dynamic or not quantizer.has_range:
        return None
    return static_range(quantizer.spec, *quantizer.qparams())


def find_probes(model: nn.Module) -> list[Probe]:
    """The float inputs of a prepared or packed model's quantized layers (those of embeddings are indices).

    Raises:
        ValueError: the model is not quantized.
    """
    found = []
    fakes, packed = fake_modules(model), packed_modules(model)
    if not fakes and not packed:
        raise ValueError(
            "the model is not quantized: give what lq.quantize or trainer.quantize returned, or a model prepared for QAT"
        )
    for name, module in {**fakes, **packed}.items():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        batch_first = getattr(module, "batch_first", None)
        batch_dim = None if batch_first is None else int(not batch_first)
        if isinstance(module, FakeMultiheadAttention):
            for index, keyword in enumerate(("query", "key", "value")):
                tensor = module.input_names[index]
                known = _fake_range(getattr(module, f"{tensor}_fake_quant"))
                found.append(Probe(f"{name}.{tensor}".lstrip("."), module, index, keyword, -1, known, batch_dim))
        elif module.weight_axes(module):
            known = (
                _packed_range(module)
                if isinstance(module, PackedModule)
                else _fake_range(getattr(module, "input_fake_quant", None))
            )
            found.append(Probe(name, module, axis=module.input_axis, packed=known, batch_dim=batch_dim))
    return found


def as_samples(x: Tensor, probe: Probe, size: int, length: int | None) -> Tensor:
    """A layer's input as float32 `[samples, tokens, channels]`; one sample for the whole batch where samples cannot be told apart.

    Args:
        size: samples in the batch; 0 if unknown.
        length: the size of the second dimension of the model's input, by which `[samples * length, features]` is told apart.
    """
    x = x.detach().float()
    batched = x.dim() > -probe.axis
    x = x.movedim(probe.axis, -1) if x.dim() >= -probe.axis else x
    channels = x.shape[-1]
    dim = probe.batch_dim if probe.batch_dim is not None else int(x.dim() > 2 and x.shape[0] != size == x.shape[1])
    if batched and size and x.dim() > dim + 1 and x.shape[dim] == size:
        return x.movedim(dim, 0).reshape(size, -1, channels)
    windows = x.dim() > 2 and x.shape[0] % max(size, 1) == 0
    if batched and size and dim == 0 and (windows or x.shape[0] == size * (length or 0)):
        return x.reshape(size, -1, channels)
    return x.reshape(1, -1, channels)


def half_width(limits: Range) -> float:
    return max((limits[1] - limits[0]) / 2, 1e-6 * max(abs(limits[0]), abs(limits[1])), 1e-30)


# --- what is seen ---------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What one layer got from one data set.

    Args:
        parts: the distribution of each part of the set, to which batches go in turn.
        rows: the same of the first batches' samples, in turn: of a set of few batches, the only parts that there are.
        records: batch number -> `[samples, 4]`: smallest and largest value, values outside the range, values; one row for the whole
            batch where samples cannot be told apart.
        channels: `[2, channels]`: each channel's smallest and largest value.
        beyond: `[channels]`: samples in which a channel leaves its range in calibration.
        latest: the number of the latest batch, and in which of its samples which channels do.
    """

    parts: list[Distribution]
    rows: list[Distribution] = field(default_factory=list)
    records: dict[int, Tensor] = field(default_factory=dict)
    channels: Tensor | None = None
    beyond: Any = 0
    latest: tuple[int, Tensor | None] = (-1, None)

    def add(
        self, x: Tensor, batch: int, first: int, limits: Range | None, known: Tensor | None, mask: Tensor | None = None
    ) -> None:
        """Take in `[samples, tokens, channels]`.

        Args:
            batch, first: the batch's number, and that of its first sample.
            limits: the range, where it is known already.
            known: `[2, channels]`, outside of which a channel counts as beyond.
            mask: `[samples, tokens]`, False where a token is padding, which does not count.
        """
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.to(x.device)
        self.parts[batch % len(self.parts)].add(x if mask is None else x[keep])
        if batch < len(self.rows):
            part = part_of(first, len(x), len(self.rows))
            for which in part.unique().tolist():
                rows = (part == which).to(x.device)
                self.rows[which].add(x[rows][keep[rows]])
        if mask is None:
            low, high = torch.aminmax(x, dim=1)
        else:
            low = x.masked_fill(~keep[..., None], torch.inf).amin(1)
            high = x.masked_fill(~keep[..., None], -torch.inf).amax(1)
        outside = torch.zeros(len(x), dtype=torch.int64)
        if limits is not None:
            outside = (((x < limits[0]) | (x > limits[1])) & keep[..., None]).sum(dim=(1, 2)).cpu()
        values = keep.sum(1).cpu() * x.shape[-1]
        self._record(batch, torch.stack([low.amin(1).cpu(), high.amax(1).cpu(), outside, values], dim=1).double())
        ends = torch.stack([low.amin(0), high.amax(0)]).cpu()
        if self.channels is None:
            self.channels = ends
        elif self.channels.shape == ends.shape:
            self.channels = torch.stack([torch.minimum(self.channels[0], ends[0]), torch.maximum(self.channels[1], ends[1])])
        if known is not None and known.shape == ends.shape:
            self._go_beyond(batch, (low.cpu() < known[0]) | (high.cpu() > known[1]))

    def _go_beyond(self, batch: int, found: Tensor) -> None:
        """Count `[samples, channels]`; a sample that passes several times counts once."""
        last, before = self.latest
        if batch == last and before is not None:
            same = len(before) == len(found)
            found = before | found if same else (before.any(0) | found.any(0))[None]
            self.beyond = self.beyond - before.sum(0)
        self.beyond = found.sum(0) + self.beyond
        self.latest = (batch, found)

    def _record(self, batch: int, rows: Tensor) -> None:
        before = self.records.get(batch)
        if before is not None:
            if len(before) != len(rows):
                before, rows = _as_one(before), _as_one(rows)
            low, high = torch.minimum(before[:, 0], rows[:, 0]), torch.maximum(before[:, 1], rows[:, 1])
            rows = torch.cat([torch.stack([low, high], dim=1), before[:, 2:] + rows[:, 2:]], dim=1)
        self.records[batch] = rows

    def comparable(self) -> tuple[list[Distribution], bool]:
        """Parts of whole batches, whose samples may be alike, if each has one, else of samples; and whether they are of batches."""
        whole = all(part.tokens for part in self.parts)
        return (self.parts, True) if whole else (self.rows, False)

    def all(self) -> Distribution:
        return functools.reduce(Distribution.merged, self.parts)


def _as_one(rows: Tensor) -> Tensor:
    """The record of a whole batch."""
    return torch.cat([rows[:, 0].min()[None], rows[:, 1].max()[None], rows[:, 2:].sum(0)])[None]


# --- watching -------------------------------------------------------------------------------------------------------


class Watch:
    """What the layers get from one data set while it is run.

    Args:
        probes: what to watch.
        before: calibration's, for the set that is compared with it.
    """

    def __init__(self, probes: list[Probe], before: Watch | None = None) -> None:
        self.probes = probes
        self.data: Samples = Samples(None if before is None else before.data)
        self.is_first = before is None
        self.seen: dict[str, Seen] = {}
        self.limits = {probe.name: probe.packed for probe in probes if probe.packed is not None}
        self.known: dict[str, Tensor] = {}
        for probe in probes if before is not None else ():
            seen = before.seen.get(probe.name)  # type: ignore[union-attr]
            if seen is None or seen.channels is None:
                continue
            low, high = seen.channels[0].min().item(), seen.channels[1].max().item()
            limits = self.limits.setdefault(probe.name, (low, high))
            self.known[probe.name] = seen.channels + torch.tensor([[-0.1], [0.1]]) * half_width(limits)

    def _empty(self) -> Seen:
        if not self.is_first:
            return Seen([Distribution()])
        parts = [Distribution() for _ in range(2 * PARTS)]
        return Seen(parts[:PARTS], parts[PARTS:])

    def start(self, batch: Any, index: int, dataloader: int = 0) -> None:
        """A batch is about to be run."""
        self.data.add(batch, index, dataloader)

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [probe.module.register_forward_pre_hook(self._hook(probe), with_kwargs=True) for probe in self.probes]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, probe: Probe) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = probe.pick(args, kwargs)
            if not self.data.sizes:  # a sanity call before the first batch
                return
            number = len(self.data.sizes) - 1
            size = self.data.sizes[number]
            if isinstance(x, PackedSequence):  # its rows are steps of several samples
                x, size = x.data, 0
            if not isinstance(x, Tensor) or x.numel() == 0:
                return
            rows = as_samples(x, probe, size, self.data.length)
            try:
                seen = self.seen.setdefault(probe.name, self._empty())
                first = self.data.starts[number] if len(rows) == size else number
                mask = self.data.mask
                fits = mask is not None and rows.shape[:2] == mask.shape
                seen.add(rows, number, first, self.limits.get(probe.name), self.known.get(probe.name), mask if fits else None)
            except ValueError:
                bad = rows.numel() - int(rows.isfinite().sum())
                if not bad:
                    raise
                told = f"{bad} of {rows.numel()} values of its input are nan or inf"
                raise ValueError(f"{probe.name or 'the model'}: {told} in batch {number}: check the data") from None

        return hook
