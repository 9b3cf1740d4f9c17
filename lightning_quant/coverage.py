"""How well calibration represented the data that a quantized model meets: two sets compared by layers and by inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.chance import (
    ALPHA,
    Units,
    chance_of_as_far,
    chance_of_more,
    channels_beyond,
    leaves_range,
    overshoot,
)
from lightning_quant.distributions import split_shift
from lightning_quant.report import table
from lightning_quant.samples import DataSummary, Sample, Samples, TokenCoverage, token_coverage
from lightning_quant.watching import Probe, Range, Watch, half_width

# how far a distribution moved to be worth a word, in calibration's standard deviations: overall, and of one channel
MATERIAL_SHIFT, MATERIAL_CHANNEL_SHIFT = 0.1, 0.5
# and how many times the largest difference between two halves of calibration
MATERIAL_RATIO = 2.0


def _worst(units: Units, data: Samples, limits: Range) -> tuple[tuple[Sample, float], tuple[Sample, float] | None]:
    """The batch and the sample of which most lies outside the range, and the share that does; None if samples mix."""
    shares = units.table[:, 2] / units.table[:, 3].clamp(min=1)
    beyond = torch.maximum(units.table[:, 1] - limits[1], limits[0] - units.table[:, 0]) / half_width(limits)
    top = int((shares + 1e-9 * beyond.clamp(-1e3, 1e3)).argmax())  # the farther out of equals
    batch_of = torch.bucketize(units.first, torch.tensor(data.starts), right=True) - 1
    totals = torch.zeros(len(data.starts), 2, dtype=torch.float64).index_add_(0, batch_of, units.table[:, 2:])
    per_batch = totals[:, 0] / totals[:, 1].clamp(min=1)
    first = data.samples[data.starts[int(per_batch.argmax())]]
    batch = (Sample(first.batch, None, first.dataloader), per_batch.max().item())
    one = units.count[top] == 1
    return batch, (data.samples[int(units.first[top])], shares[top].item()) if one else None


# --- the report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCoverage:
    """One layer's input in both sets. Shares are 0..1.

    Args:
        name: the layer's.
        range: outside of which validation is counted; None if there is none.
        source: where the range is from: `packed` (the static range that the layer clips to) or `calibration` (what it saw).
        outside, calibration_outside: the share of the validation and the calibration set's values outside of it.
        samples_outside, samples: of how many validation samples (batches, where a layer mixes samples) any value is.
        split_outside: the share of calibration's samples that leave the range of the other half of calibration; None: too few.
        overshoot: how far validation reaches beyond the range and all of calibration, in halves of the range's width.
        shift, split_shift: the Wasserstein-1 distance of the sets, and of the halves of calibration scaled to these sets' sizes,
            in standard deviations of calibration; the largest of all ways to halve it; None: fewer than 8 samples.
        channel_shift, split_channel_shift: the same of the channel that moved most, by mean and standard deviation.
        channels: those that leave their own range in calibration by a tenth of the layer's, in more samples than by chance.
        worst_batch, worst_sample: of which most lies outside, and the share of it that does.
        leaves, moved: whether that is a finding: out of the range, or distributed differently.
        unreached: by which of the sets, if any.
    """

    name: str
    range: Range | None = None
    source: str = ""
    outside: float = 0.0
    calibration_outside: float = 0.0
    samples_outside: int = 0
    samples: int = 0
    split_outside: float | None = None
    overshoot: float = 0.0
    shift: float = 0.0
    split_shift: float | None = None
    channel_shift: float = 0.0
    split_channel_shift: float | None = None
    channels: tuple[int, ...] = ()
    worst_batch: tuple[Sample, float] | None = None
    worst_sample: tuple[Sample, float] | None = None
    leaves: bool = False
    moved: bool = False
    unreached: tuple[str, ...] = ()

    @property
    def badness(self) -> tuple[float, ...]:
        """By which rows are sorted, worst first."""
        kinds = (self.leaves, self.unreached == ("calibration",), bool(self.channels), self.moved)
        return (*map(float, kinds), self.outside, self.overshoot, self.shift)

    def findings(self) -> Iterator[str]:
        name = self.name or "(root)"
        if self.leaves and self.range is not None:
            where = f"{'packed' if self.source == 'packed' else 'calibrated'} range [{self.range[0]:.4g}, {self.range[1]:.4g}]"
            told = f"{name}: {_percent(self.outside)} of the validation set's input lies outside of the {where}"
            told += f" ({_percent(self.calibration_outside)} of calibration's), in {self.samples_outside} of {self.samples} inputs"
            if self.overshoot:
                told += f", up to {self.overshoot:.2g} half-widths beyond"
            worst = self.worst_sample or self.worst_batch
            yield told + (f"; worst is {worst[0]}, {_percent(worst[1])} of it outside" if worst else "")
        for which in self.unreached:
            other = "validation" if which == "calibration" else "calibration"
            both = len(self.unreached) > 1
            if not both or which == "calibration":
                yield f"{name}: no input in {'either set' if both else f'the {which} set, only in {other}'}"
        if self.channels:
            listed = _listed(map(str, self.channels), 8)
            yield f"{name}: {len(self.channels)} of its input's channels leave their range in calibration by far: {listed}"
        if self.moved:
            split = "" if self.split_shift is None else f" ({self.split_shift:.2f} between halves of calibration)"
            channel = "" if self.split_channel_shift is None else f" ({self.split_channel_shift:.2f})"
            yield (
                f"{name}: its input is distributed differently: moved by {self.shift:.2f} standard deviations{split}, the channel "
                f"that moved most by {self.channel_shift:.2f}{channel}"
            )


@dataclass(frozen=True)
class InputGroup:
    """Validation samples that have in common what no calibration sample has.

    Args:
        what: such as `class 7`, `longer than 128 (up to 512)`, `size 3x64x64` or `tokens that calibration never had`.
        samples, of: how many of how many validation samples.
        chance: how likely no calibration sample is in the group, if both sets were drawn alike; None: judged by another measure.
        example: the first of them.
        layers: (layer, share of their values outside its range) of the layers whose range they leave.
        is_finding: whether chance does not explain it, or they leave a layer's range.
    """

    what: str
    samples: int
    of: int
    chance: float | None
    example: Sample
    layers: tuple[tuple[str, float], ...] = ()
    is_finding: bool = False

    def __str__(self) -> str:
        told = f"{self.what}: {self.samples} of {self.of} validation inputs, none in calibration, such as {self.example}"
        if not self.layers:
            return told + "; they leave no layer's range"
        listed = _listed((f"{name or '(root)'} ({_percent(share)})" for name, share in self.layers), 6)
        return told + f"; they leave the range of {len(self.layers)} layer{'s' * (len(self.layers) > 1)}: {listed}"


@dataclass(frozen=True)
class CalibrationReport:
    """How well calibration represented validation. Prints as tables and findings.

    Args:
        rows: one a layer, worst first.
        groups: kinds of inputs that calibration never had.
        calibration, validation: what the sets hold.
        tokens: how much of the text calibration knows; None without tokens.
        findings: what calibration did not represent, in plain sentences, worst first; empty if nothing was found.
    """

    rows: list[LayerCoverage]
    groups: list[InputGroup]
    calibration: DataSummary
    validation: DataSummary
    tokens: TokenCoverage | None
    findings: list[str]

    def worst(self, n: int = 5) -> list[LayerCoverage]:
        """The n layers that calibration represented least."""
        return self.rows[:n]

    def __str__(self) -> str:
        parts = [_data_table(self.calibration, self.validation)]
        if self.tokens is not None:
            shares = _percent(self.tokens.unseen), _percent(self.tokens.split_unseen)
            new = f"{shares[0]} of validation's tokens are new ({shares[1]} in a split of "
            listed = _listed((f"{token} ({count} times)" for token, count in self.tokens.most_frequent), 5)
            parts.append(f"{new}calibration itself){': ' + listed if listed else ''}")
        parts.append(_layer_table(self.rows[:_SHOWN]))
        if len(self.rows) > _SHOWN:
            parts.append(f"and {len(self.rows) - _SHOWN} more layers in .rows")
        head = "what calibration did not represent:" if self.findings else "calibration represented the validation set"
        more = [f"- and {len(self.findings) - _SHOWN} more in .findings"] * (len(self.findings) > _SHOWN)
        parts.append("\n".join([head, *(f"- {told}" for told in self.findings[:_SHOWN]), *more]))
        return "\n\n".join(parts)


_SHOWN = 20


def _percent(share: float) -> str:
    return "< 0.01 %" if 0 < share < 1e-4 else f"{100 * share:.2f} %"


def _listed(items: Iterable[str], most: int) -> str:
    found = list(items)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _data_table(*sets: DataSummary) -> str:
    rows = []
    for data in sets:
        lengths = "" if data.lengths is None else f"{data.lengths[0]} / {data.lengths[1]:.1f} / {data.lengths[2]}"
        rows.append(
            (data.name, data.batches, data.samples, lengths, data.tokens or "", len(data.classes) or "", _listed(data.sizes, 3))
        )
    return table(("set", "batches", "inputs", "length min / mean / max", "tokens", "classes", "sizes"), rows)


def _layer_table(rows: Iterable[LayerCoverage]) -> str:
    cells = []
    for row in rows:
        if row.unreached:
            cells.append((row.name or "(root)", *[""] * 7, f"not reached by {' nor '.join(row.unreached)}"))
            continue
        split = "" if row.split_outside is None else f"{100 * row.split_outside:.1f}"
        shift = f"{row.shift:.2f}" + ("" if row.split_shift is None else f" ({row.split_shift:.2f})")
        channel = f"{row.channel_shift:.2f}" + ("" if row.split_channel_shift is None else f" ({row.split_channel_shift:.2f})")
        sample = f"{100 * row.samples_outside / max(row.samples, 1):.1f} ({split})"
        shares = (f"{100 * row.outside:.2f}", f"{100 * row.calibration_outside:.2f}", sample)
        worst = row.worst_sample or row.worst_batch
        told = str(worst[0]) if worst and row.samples_outside else ""
        cells.append((row.name or "(root)", row.source, *shares, f"{row.overshoot:.2f}", shift, channel, told))
    header = ("layer", "range of", "outside %", "calibration %", "inputs % (split)", "beyond", "shift (split)", "channel (split)")
    return table((*header, "worst input"), cells)


# what a group of samples is called, which they are (`[samples]`, bool), the chance of it
Kind = tuple[str, Tensor, float | None]


# --- judging --------------------------------------------------------------------------------------------------------


def _moved(shifts: Sequence[float], splits: Sequence[float | None]) -> bool:
    """Whether a shift is larger than what matters, and than what halves of calibration show."""
    limits = (MATERIAL_SHIFT, MATERIAL_CHANNEL_SHIFT)
    return any(
        split is not None and value > max(least, MATERIAL_RATIO * split)
        for value, split, least in zip(shifts, splits, limits, strict=True)
    )


def _layer(probe: Probe, calibration: Watch, validation: Watch, tests: int) -> LayerCoverage:
    before, after = calibration.seen.get(probe.name), validation.seen.get(probe.name)
    missing = tuple(name for name, seen in (("calibration", before), ("validation", after)) if seen is None)
    source = "packed" if probe.packed is not None else "calibration"
    if before is None or after is None:
        return LayerCoverage(probe.name, probe.packed, source, unreached=missing)
    limits = validation.limits[probe.name]
    base, units = Units.of(before, calibration.data), Units.of(after, validation.data)
    whole, deviation = before.all(), before.all().deviation()
    shift, channel_shift = after.all().shift_from(whole, deviation)
    parts, of_batches = before.comparable()
    sizes = (len(before.records), len(after.records)) if of_batches else (len(base.table), len(units.table))
    # the noise of a difference goes with sqrt(1 / n + 1 / m), and halves are of n / 2
    scale = (1 + sizes[0] / sizes[1]) ** 0.5 / 2
    halves = split_shift(parts, deviation)
    split = (None, None) if halves is None else (scale * halves[0], scale * halves[1])
    beyond = after.beyond if isinstance(after.beyond, Tensor) else torch.zeros(0, dtype=torch.int64)
    batch, sample = _worst(units, validation.data, limits)
    return LayerCoverage(
        probe.name,
        limits,
        source,
        units.share(),
        base.share() if probe.packed is not None else 0.0,
        int(units.leaves(limits).sum()),
        len(units.table),
        base.split_share(),
        overshoot(units, base, limits),
        shift,
        split[0],
        channel_shift,
        split[1],
        channels_beyond(beyond, len(units.table), len(base.table), tests * max(beyond.numel(), 1)),
        batch,
        sample,
        leaves_range(units, base, limits, tests),
        _moved((shift, channel_shift), split),
    )


def _new_lengths(calibration: Samples, validation: Samples) -> Iterator[Kind]:
    """Samples that are longer, or shorter, than any of calibration."""
    sets = [data.units() if data.padded else data.samples for data in (calibration, validation)]
    base, found = (torch.tensor([unit.length for unit in units if unit.length is not None]).double() for units in sets)
    if not len(base) or not len(found):
        return
    lengths = torch.tensor([float("nan") if sample.length is None else sample.length for sample in validation.samples])
    for sign, word, end in ((1, "longer", "up to"), (-1, "shorter", "down to")):
        last = (sign * base).max().item()
        group = sign * lengths > last
        if group.any():
            far = (sign * found).max().item()
            often = chance_of_more(int((sign * found > last).sum()), len(found), 0, len(base))
            chance = min(often, chance_of_as_far(far, len(found), sign * base, 1.0))
            yield f"{word} than {sign * last:.0f} ({end} {sign * far:.0f})", group, 4 * chance


def _new_kinds(calibration: Samples, validation: Samples, field: str) -> Iterator[Kind]:
    """Samples of a label or size that calibration has not; a size is that of a whole batch."""
    by_batch = field == "size"
    base, found = (
        [getattr(unit, field) for unit in (data.units() if by_batch else data.samples)] for data in (calibration, validation)
    )
    known, mine = set(base) - {None, ""}, [getattr(sample, field) for sample in validation.samples]
    if not known:
        return
    counts = Counter(found)
    new = sorted(set(mine) - known - {None, ""})
    for value in new:
        group = torch.tensor([other == value for other in mine])
        chance = chance_of_more(counts[value], len(found), 0, len(base)) * len(set(mine))
        yield f"{'class' if field == 'label' else 'size'} {value}", group, chance


def _groups(probes: Sequence[Probe], calibration: Watch, validation: Watch, tokens: TokenCoverage | None) -> list[InputGroup]:
    before, after = calibration.data, validation.data
    kinds: list[Kind] = [*_new_kinds(before, after, "label"), *_new_lengths(before, after), *_new_kinds(before, after, "size")]
    if tokens is not None and tokens.is_new:
        group = torch.tensor([sample.new_tokens for sample in after.samples])
        frequent = _listed((str(token) for token, _ in tokens.most_frequent), 5)
        share = f"{_percent(tokens.unseen)} of all, {_percent(tokens.split_unseen)} in a split of calibration"
        kinds.append((f"tokens that calibration never had ({share}): {frequent}", group, None))
    units = []
    for probe in probes:
        if probe.name in calibration.seen and probe.name in validation.seen:
            both = (Units.of(calibration.seen[probe.name], before), Units.of(validation.seen[probe.name], after))
            units.append((probe.name, *both, validation.limits[probe.name]))
    found = []
    for what, group, chance in kinds:
        hits = []
        for name, base, all_units, limits in units:
            mine = all_units.select(all_units.is_in(group))
            if len(mine.table) and leaves_range(mine, base, limits, len(units) * len(kinds), len(all_units.table)):
                hits.append((name, mine.share()))
        hits.sort(key=lambda hit: -hit[1])
        example = after.samples[int(group.nonzero()[0])]
        count = int(group.sum())
        new = chance is None or chance < ALPHA
        told = None if chance is None else min(chance, 1.0)
        found.append(InputGroup(what, count, len(after.samples), told, example, tuple(hits), new or bool(hits)))
    return sorted(found, key=lambda group: (not group.layers, not group.is_finding, -len(group.layers), -group.samples))


def coverage_report(calibration: Watch, validation: Watch) -> CalibrationReport:
    """Compare what two sets gave a model's layers.

    Raises:
        ValueError: no layer was reached by any of them.
    """
    probes = calibration.probes
    if not calibration.seen and not validation.seen:
        raise ValueError(
            "no quantized layer was run by either set: the step or forward must call the model that was given, uncompiled"
        )
    rows = sorted(
        (_layer(probe, calibration, validation, len(probes)) for probe in probes), key=lambda row: row.badness, reverse=True
    )
    tokens = token_coverage(calibration.data, validation.data)
    groups = _groups(probes, calibration, validation, tokens)
    told = [group for group in groups if group.is_finding]
    findings = [str(group) for group in told if group.layers] + [sentence for row in rows for sentence in row.findings()]
    findings += [str(group) for group in told if not group.layers]
    sets = DataSummary.of("calibration", calibration.data), DataSummary.of("validation", validation.data)
    return CalibrationReport(rows, groups, *sets, tokens, findings)
