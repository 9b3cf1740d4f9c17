from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_quant as lq
from lightning_quant.chance import chance_of_as_far, chance_of_more, channels_beyond
from lightning_quant.distributions import Distribution, Histogram, split_shift
from lightning_quant.samples import Samples, token_coverage
from lightning_quant.spec import QuantSpec
from lightning_quant.watching import Probe, Watch, as_samples, find_probes, static_range
from tests.digits import Classifier, Digits, trainer
from tests.helpers import assert_same_state

CLASSES, PLANTED = 4, 3


def make_images(count: int, classes: list[int], seed: int) -> TensorDataset:
    """Class c lights channel c of 4; the planted one is four times as bright, in a corner of its own."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.randint(len(classes), (count,), generator=draw)]
    images = 0.1 * torch.rand(count, CLASSES, 6, 6, generator=draw)
    for image, label in zip(images, labels.tolist()):
        image[label, :3, :3] += (4.0 if label == PLANTED else 1.0) * torch.rand(3, 3, generator=draw)
    return TensorDataset(images, labels)


class Images(L.LightningDataModule):
    def __init__(self, calibrated: list[int], seed: int = 0) -> None:
        super().__init__()
        self.calibrated, self.seed = calibrated, seed

    def calibration_dataloader(self) -> DataLoader:
        return DataLoader(make_images(128, self.calibrated, 10 * self.seed + 1), 16)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(make_images(128, list(range(CLASSES)), 10 * self.seed + 2), 16)


class ConvNet(L.LightningModule):
    """The planted class's channel goes on into `deep`; `blind` gets the class only through a tanh, in its range."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(CLASSES, CLASSES, 1, groups=CLASSES), nn.Conv2d(CLASSES, 6, 3)
        self.blind = nn.Linear(6, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.batches_seen = 0
        with torch.no_grad():
            self.first.weight.fill_(1.0)
            self.first.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(torch.relu(self.first(x)))
        return self.blind(torch.sin(50 * x).mean(dim=(2, 3)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.batches_seen += 1
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)


def left(report: lq.CalibrationReport) -> set[str]:
    return {row.name for row in report.rows if row.leaves}


def sentences(report: lq.CalibrationReport, word: str) -> list[str]:
    return [told for told in report.findings if word in told]


# --- a class that calibration never saw -----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w8a16", "w8a8"])
def test_names_a_class_and_the_layers_it_hits(recipe: str) -> None:
    data = Images([0, 1, 2])
    qmodel = lq.quantize(ConvNet(), recipe, datamodule=data)
    report = lq.calibration_report(qmodel, datamodule=data)
    # a packed first layer clips the class, so that those behind it see little of it
    hit = {"first"} if recipe == "w8a8" else {"first", "deep"}
    assert hit <= left(report)
    assert "blind" not in left(report)
    group = next(group for group in report.groups if group.is_finding)
    labels = make_images(128, list(range(CLASSES)), 2).tensors[1]
    assert (group.what, group.samples, group.of) == (f"class {PLANTED}", int((labels == PLANTED).sum()), 128)
    assert hit <= {name for name, _ in group.layers}
    assert sum(found.is_finding for found in report.groups) == 1
    assert report.findings[0].startswith(f"class {PLANTED}: {group.samples} of 128")
    assert "first" in report.findings[0]
    assert report.worst(1)[0].name in hit
    for row in report.rows:
        if row.name in hit:
            assert row.worst_sample is not None
            assert row.worst_sample[0].label == PLANTED
    first = next(row for row in report.rows if row.name == "first")
    assert PLANTED in first.channels
    assert report.findings[0] in str(report)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w4a4"])
def test_names_nothing_if_both_sets_are_drawn_alike(recipe: str, seed: int) -> None:
    data = Images(list(range(CLASSES)), seed)
    report = lq.calibration_report(lq.quantize(ConvNet(), recipe, datamodule=data), datamodule=data)
    assert report.findings == []
    assert "calibration represented the validation set" in str(report)


def test_numbers_are_those_of_the_inputs() -> None:
    """Range, shares and extremes of the first layer, computed again from the data."""
    data = Images([0, 1, 2])
    qmodel = lq.quantize(ConvNet(), "w8a8", datamodule=data)
    row = next(row for row in lq.calibration_report(qmodel, datamodule=data).rows if row.name == "first")
    before, after = make_images(128, [0, 1, 2], 1).tensors[0], make_images(128, list(range(CLASSES)), 2).tensors[0]
    step = qmodel.first.input_scale.item()
    high = (127 - qmodel.first.input_zero_point.item() + 0.5) * step
    outside = after > high
    assert row.range is not None
    assert row.range[1] == pytest.approx(high, rel=1e-4)
    assert row.outside == pytest.approx(outside.double().mean().item())
    assert row.calibration_outside == 0.0
    assert row.samples_outside == outside.flatten(1).any(1).sum()
    assert row.overshoot == pytest.approx((after.max().item() - high) / ((row.range[1] - row.range[0]) / 2), rel=1e-3)
    share = outside.flatten(1).double().mean(1)
    assert row.worst_sample is not None
    assert row.worst_batch is not None
    assert row.worst_sample[1] == pytest.approx(share.max().item())
    assert share[16 * row.worst_sample[0].batch + row.worst_sample[0].row] == share.max()  # type: ignore[operator]
    assert row.worst_batch[0].batch == share.view(-1, 16).mean(1).argmax()
    ordered = [values.double().flatten().quantile(torch.linspace(0, 1, 4001, dtype=torch.float64)) for values in (before, after)]
    distance = (ordered[0] - ordered[1]).abs().mean().item() / before.double().std().item()
    assert row.shift == pytest.approx(distance, rel=0.05)


# --- a prompt length that calibration never saw ---------------------------------------------------------------------


class Tiny(L.LightningModule):
    """A language model whose positions from 16 on have larger embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 16), nn.Embedding(64, 16)
        self.mix, self.norm, self.head = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 50)
        with torch.no_grad():
            self.positions.weight.mul_(0.3)
            self.positions.weight[16:] *= 15

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        return self.head(self.norm(x + self.mix(x)) * attention_mask[..., None])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("mean", self(**batch).mean())


def prompts(lengths: list[int], seed: int, vocabulary: int = 50, size: int = 8) -> list[dict[str, Tensor]]:
    """Padded batches of prompts of these lengths."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for start in range(0, len(lengths), size):
        mine = torch.tensor(lengths[start : start + size])
        mask = torch.arange(int(mine.max())) < mine[:, None]
        ids = torch.randint(1, vocabulary, mask.shape, generator=draw)
        found.append({"input_ids": ids * mask, "attention_mask": mask.long()})
    return found


SHORT = [4 + index * 7 % 12 for index in range(64)]


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w8a16"])
def test_names_a_length_and_the_layers_it_hits(recipe: str) -> None:
    before, after = prompts(SHORT, 0), prompts(SHORT, 1)
    after[5] = prompts([*SHORT[:5], 40, 9, 38], 2)[0]
    qmodel = lq.quantize(Tiny(), recipe, batches=before)
    report = lq.calibration_report(qmodel, calibration=before, validation=after)
    group = next(group for group in report.groups if group.is_finding)
    assert group.what == "longer than 15 (up to 40)"
    assert (group.samples, group.example.batch, group.example.row, group.example.length) == (2, 5, 5, 40)
    assert [name for name, _ in group.layers] == ["mix"]  # behind the norm the head sees nothing of it
    assert report.findings[0] == str(group)
    assert left(report) == {"mix"}
    mix = report.worst(1)[0]
    assert mix.worst_batch is not None
    assert (mix.name, mix.worst_batch[0].batch) == ("mix", 5)
    assert report.calibration.lengths == (4, sum(SHORT) / 64, 15)
    assert report.validation.lengths is not None
    assert report.validation.lengths[::2] == (4, 40)
    assert "4 / 9.4 / 15" in str(report)


@pytest.mark.parametrize("seed", [0, 45, 48])
def test_names_no_length_if_both_sets_are_drawn_alike(seed: int) -> None:
    """Lengths with a long tail: one set's longest are picked, and by that lie far out."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    before, after = (prompts([min(60, int(draw.expovariate(0.1)) + 2) for _ in range(64)], seed + part) for part in (10, 2000))
    qmodel = lq.quantize(Tiny(), "w8a8", batches=before)
    assert lq.calibration_report(qmodel, calibration=before, validation=after).findings == []


def test_lengths_without_a_mask_are_those_of_batches() -> None:
    """Rows of a batch share its length, so one longer batch is no evidence by itself; what it does to a layer is."""
    net = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 4))
    draw = torch.Generator().manual_seed(0)
    before, after = ([torch.randint(50, (8, 4 + index % 3), generator=draw) for index in range(16)] for _ in range(2))
    after[3] = torch.randint(50, (8, 7), generator=draw)
    report = lq.calibration_report(lq.quantize(net, "w8a16"), calibration=before, validation=after)
    assert [(group.what, group.is_finding) for group in report.groups] == [("longer than 6 (up to 7)", False)]
    assert report.findings == []


def test_names_tokens_that_are_new() -> None:
    before, after = prompts(SHORT, 0, vocabulary=30), prompts(SHORT, 1)
    report = lq.calibration_report(lq.quantize(Tiny(), "w8a16"), calibration=before, validation=after)
    valid = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in after])
    assert report.tokens is not None
    assert report.tokens.unseen == pytest.approx((valid >= 30).double().mean().item())
    counts = valid[valid >= 30].bincount()
    assert report.tokens.most_frequent[0] == (counts.argmax().item(), counts.max().item())
    assert report.tokens.split_unseen < 0.05
    assert len(sentences(report, "tokens that calibration never had")) == 1
    assert report.validation.tokens == len(valid)
    again = lq.calibration_report(lq.quantize(Tiny(), "w8a16"), calibration=after, validation=prompts(SHORT, 5))
    assert not sentences(again, "tokens")


# --- the user's things stay as they are -----------------------------------------------------------------------------


def test_model_trainer_and_random_states_are_untouched(trained: Classifier) -> None:
    mine = trainer(1)
    mine.validate(trained, datamodule=Digits(), verbose=False)
    qmodel = mine.quantize(trained, datamodule=Digits(), recipe="w8a8")
    mine.validate(qmodel, datamodule=Digits(), verbose=False)
    metrics, callbacks, loggers = dict(mine.callback_metrics), list(mine.callbacks), list(mine.loggers)
    state, seen, kind = {name: value.clone() for name, value in qmodel.state_dict().items()}, list(qmodel.seen), type(qmodel)
    qmodel.train()
    modes = [module.training for module in qmodel.modules()]
    count = qmodel.accuracy._update_count
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    report = lq.calibration_report(qmodel, trainer=mine, batches=3)  # the trainer's datamodule
    assert (report.calibration.samples, report.validation.samples) == (3 * 64, 500)  # two batches of 250
    assert torch.equal(random_states[0], torch.get_rng_state())
    assert random.getstate() == random_states[1]
    assert np.array_equal(np.random.get_state()[1], random_states[2][1])
    assert_same_state(qmodel.state_dict(), state)
    assert (qmodel.seen, type(qmodel), qmodel.accuracy._update_count) == (seen, kind, count)
    assert [module.training for module in qmodel.modules()] == modes
    assert not any(module._forward_pre_hooks for module in qmodel.modules())
    assert (dict(mine.callback_metrics), list(mine.callbacks), list(mine.loggers)) == (metrics, callbacks, loggers)
    assert mine.limit_val_batches == 1.0
    assert isinstance(mine.datamodule, Digits)


def test_states_are_restored_after_an_error() -> None:
    data = Images([0, 1])
    qmodel = lq.quantize(ConvNet(), "w8a8", datamodule=data)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def broken(model: nn.Module, batch: Any) -> None:
        torch.rand(1)
        random.random()
        np.random.rand()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lq.calibration_report(qmodel, datamodule=data, forward=broken)
    assert torch.equal(before[0], torch.get_rng_state())
    assert random.getstate() == before[1]
    assert np.random.get_state()[2] == before[2][2]
    assert type(qmodel) is ConvNet
    assert not any(module._forward_pre_hooks for module in qmodel.modules())


def test_a_prepared_model_is_not_changed() -> None:
    """Its ranges stay, though its observers were on, and it gives the report of the packed model."""
    before, after = ([make_images(16, classes, seed).tensors[0] for seed in range(9)] for classes in ([0, 1, 2], [0, 1, 2, 3]))
    model = lq.prepare(nn.Sequential(nn.Conv2d(CLASSES, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)), "w8a8")
    for module in model:
        for _, quantizer in getattr(module, "quantizers", list)():
            quantizer.observing = True
    model.eval()(torch.cat(before))
    packed = lq.convert(model)
    for module in model:
        for _, quantizer in getattr(module, "quantizers", list)():
            quantizer.quantizing = True
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = lq.calibration_report(model, calibration=before, validation=after)
    assert_same_state(model.state_dict(), state)
    assert all(quantizer.observing for module in (model[0], model[2]) for _, quantizer in module.quantizers())
    wanted = lq.calibration_report(packed, calibration=before, validation=after)
    assert left(report) == left(wanted)
    assert "0" in left(report)
    first, other = (next(row for row in each.rows if row.name == "0") for each in (report, wanted))
    assert (first.outside, first.range) == (other.outside, other.range)


# --- layers and data of other shapes --------------------------------------------------------------------------------


class Both(nn.Module):
    """Calls a layer only for inputs of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.rarely, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rarely(x) if x.min() >= 0 else self.often(x)


def test_says_which_layers_a_set_did_not_reach() -> None:
    negative, positive = [torch.randn(8, 4) for _ in range(4)], [torch.rand(8, 4) for _ in range(4)]
    qmodel = lq.quantize(Both(), "w8a8-dynamic")
    report = lq.calibration_report(qmodel, calibration=negative, validation=[*negative, *positive])
    assert {row.name: row.unreached for row in report.rows} == {
        "often": (),
        "rarely": ("calibration",),
        "never": ("calibration", "validation"),
    }
    assert report.worst(1)[0].name == "rarely"
    assert "rarely: no input in the calibration set, only in validation" in report.findings
    assert "never: no input in either set" in report.findings
    assert "not reached by calibration nor validation" in str(report)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(3, 4, 3), (8, 3, 9)),
        (lambda: nn.Conv3d(3, 4, 1), (8, 3, 2, 2, 2)),
        (lambda: nn.ConvTranspose2d(3, 4, 2), (8, 3, 4, 4)),
        (lambda: nn.Linear(3, 4), (8, 3)),
        (lambda: nn.Linear(3, 4), (8, 5, 6, 3)),
        (lambda: nn.LSTM(3, 4, batch_first=True), (8, 5, 3)),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (8, 5, 4)),
    ],
)
@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w8a16"])
def test_finds_the_sample_in_any_shape(make: Any, shape: tuple[int, ...], recipe: str) -> None:
    before, after = ([torch.rand(shape) for _ in range(16)] for _ in range(2))
    after[3][5] += 20
    report = lq.calibration_report(lq.quantize(nn.Sequential(make()), recipe), calibration=before, validation=after)
    found = [row.worst_sample[0] for row in report.rows if row.leaves and row.worst_sample]
    assert found
    assert {(sample.batch, sample.row) for sample in found} == {(3, 5)}


def test_lightning_modules_with_several_validation_loaders() -> None:
    class Two(Images):
        def val_dataloader(self) -> list[DataLoader]:  # type: ignore[override]
            return [DataLoader(make_images(64, [0, 1, 2], seed), 16) for seed in (3, 4)]

    class Step(ConvNet):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch[0] * (1 + 4 * dataloader_idx * batch_idx))

    data = Two([0, 1, 2])
    report = lq.calibration_report(lq.quantize(Step(), "w8a8", datamodule=data), datamodule=data)
    first = next(row for row in report.rows if row.name == "first")
    assert first.leaves
    assert first.worst_batch is not None
    assert (first.worst_batch[0].dataloader, first.worst_batch[0].batch) == (1, 3)
    assert "dataloader 1, batch 3" in str(report)


def test_a_plain_module_with_a_datamodule_and_a_module_with_its_own_loaders() -> None:
    data = Images([0, 1, 2])
    net = nn.Sequential(nn.Conv2d(CLASSES, 4, 3))
    report = lq.calibration_report(
        lq.quantize(net, "w8a16"), datamodule=data, forward=lambda model, batch: model(batch[0]), batches=4
    )
    assert (report.calibration.samples, report.validation.samples) == (64, 64)

    class Own(ConvNet):
        calibration_dataloader = Images.calibration_dataloader
        val_dataloader = Images.val_dataloader
        calibrated, seed = (0, 1, 2), 0

    own = lq.calibration_report(lq.quantize(Own(), "w8a8"))
    assert PLANTED in own.validation.classes
    assert PLANTED not in own.calibration.classes
    assert "first" in left(own)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do() -> None:
    qnet = lq.quantize(nn.Sequential(nn.Linear(4, 4)), "w8a16")
    data = [torch.rand(8, 4)]
    with pytest.raises(ValueError, match="not quantized: give what lq.quantize"):
        lq.calibration_report(nn.Linear(4, 4), calibration=data, validation=data)
    with pytest.raises(ValueError, match="no calibration data: no datamodule was given; give calibration="):
        lq.calibration_report(qnet, validation=data)
    with pytest.raises(ValueError, match="no validation data"):
        lq.calibration_report(qnet, calibration=data)
    with pytest.raises(ValueError, match=r"no validation data: LightningDataModule has no val_dataloader\(\)"):
        lq.calibration_report(qnet, calibration=data, datamodule=L.LightningDataModule())
    with pytest.raises(ValueError, match="the calibration set gave no batch"):
        lq.calibration_report(qnet, calibration=[], validation=data)
    with pytest.raises(ValueError, match="the validation set gave no batch"):
        lq.calibration_report(qnet, calibration=data, validation=iter([]))
    with pytest.raises(ValueError, match="validation is a Tensor"):
        lq.calibration_report(qnet, calibration=data, validation=data[0])
    with pytest.raises(ValueError, match="batches=0"):
        lq.calibration_report(qnet, calibration=data, validation=data, batches=0)
    with pytest.raises(ValueError, match="choose the datamodule's sets or those"):
        lq.calibration_report(qnet, calibration=data, validation=data, datamodule=Images([0]))
    with pytest.raises(ValueError, match=r"^0: 1 of 32 values of its input are nan or inf in batch 1"):
        lq.calibration_report(
            qnet,
            calibration=[
                *data,
                data[0]
                .clone()
                .index_fill_(0, torch.tensor(0), 0)
                .fill_diagonal_(0)
                .index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan)),
            ],
            validation=data,
        )
    with pytest.raises(ValueError, match="no quantized layer was run"):
        lq.calibration_report(qnet, calibration=data, validation=data, forward=lambda model, batch: None)


def test_empty_sets_of_a_lightning_module() -> None:
    qmodel = lq.quantize(ConvNet(), "w8a16")
    some, none = DataLoader(make_images(16, [0, 1], 0), 8), DataLoader(TensorDataset(torch.zeros(0, 4, 6, 6), torch.zeros(0)))
    with pytest.raises(ValueError, match="the validation set gave no batch"):
        lq.calibration_report(qmodel, calibration=some, validation=none)
    assert type(qmodel) is ConvNet


# --- the maths ------------------------------------------------------------------------------------------------------


def test_chance_of_more_counts_the_ways() -> None:
    """Against all ways to choose which of 7 samples are the 4 of the second set."""
    flags = [1, 1, 1, 0, 0, 0, 0]
    for count in range(4):
        ways = list(itertools.combinations(range(7), 4))
        wanted = sum(sum(flags[index] for index in way) >= count for way in ways) / len(ways)
        assert chance_of_more(count, 4, 3 - count, 3) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "draw", [torch.rand, torch.randn, lambda count: -torch.rand(count).log(), lambda count: torch.rand(count) ** -0.5]
)
def test_chance_of_as_far_is_no_smaller_than_the_truth(draw: Any) -> None:
    """How often the farthest of samples drawn alike is called improbable: not more often than said, whatever the tail."""
    called = sum(chance_of_as_far(draw(100).max().item(), 100, draw(100), 1e-6) < 0.02 for _ in range(1000))
    assert called <= 1000 * 0.02 + 4 * math.sqrt(1000 * 0.02)


def test_channels_beyond() -> None:
    assert channels_beyond(torch.tensor([0, 30, 1, 2]), 100, 100, 4) == (1,)


def test_distance_is_that_of_the_values() -> None:
    one, two = torch.randn(5000), 3 * torch.randn(5000) + 40
    histograms = []
    for values in (one, two):
        histograms.append(Histogram())
        for part in values.split(777):
            histograms[-1].update(part[None])
    wanted = (one.sort().values - two.sort().values).abs().mean().item()
    assert histograms[0].distance(histograms[1]) == pytest.approx(wanted, rel=1e-2)
    assert histograms[1].distance(histograms[0]) == pytest.approx(wanted, rel=1e-2)
    assert histograms[0].distance(histograms[0]) == 0.0
    merged, whole = Histogram(), Histogram()
    for part in histograms:
        merged.merge(part)
    whole.update(torch.cat([one, two])[None])
    assert_same_state(merged.state_dict(), whole.state_dict())


def test_split_shift_is_the_largest_of_all_halvings() -> None:
    parts = [Distribution() for _ in range(4)]
    for index, part in enumerate(parts):
        part.add(torch.randn(20, 3, 5) * (1 + index) + index)
    found = []
    for chosen in itertools.combinations(range(4), 2):
        one, two = Distribution(), Distribution()
        for index, part in enumerate(parts):
            if index in chosen:
                one = one.merged(part)
            else:
                two = two.merged(part)
        found.append(one.shift_from(two, 2.0))
    assert split_shift(parts, 2.0) == pytest.approx((max(shift[0] for shift in found), max(shift[1] for shift in found)))
    assert split_shift([*parts, Distribution()], 2.0) is None


@pytest.mark.parametrize(
    ("spec", "values"), [(QuantSpec(8, granularity="tensor"), 127), (QuantSpec(8, "float8_e4m3fn", granularity="tensor"), 448)]
)
def test_static_range(spec: QuantSpec, values: float) -> None:
    low, high = static_range(spec, torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32))
    assert high == pytest.approx(0.5 * values + (0.25 if spec.is_int else 0), rel=1e-3)
    assert low == pytest.approx(-0.5 * (values + spec.is_int) - (0.25 if spec.is_int else 0), rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "axis", "wanted"),
    [
        ((8, 3), -1, (8, 1, 3)),
        ((8, 5, 3), -1, (8, 5, 3)),
        ((5, 8, 3), -1, (8, 5, 3)),  # time first
        ((40, 3), -1, (8, 5, 3)),  # flattened tokens
        ((16, 3), -1, (1, 16, 3)),  # some of the tokens, as an expert gets them
        ((32, 2, 3), -1, (8, 8, 3)),  # windows
        ((8, 3, 4, 4), -3, (8, 16, 3)),
        ((3, 4, 4), -3, (1, 16, 3)),  # no batch
        ((3,), -1, (1, 1, 3)),
    ],
)
def test_samples_of_a_layers_input(shape: tuple[int, ...], axis: int, wanted: tuple[int, ...]) -> None:
    x = torch.arange(float(math.prod(shape))).view(shape)
    found = as_samples(x, Probe("", nn.Identity(), axis=axis), 8, 5)
    assert found.shape == wanted
    assert torch.equal(found.flatten().sort().values, x.flatten())
    if wanted[0] == 8 and shape[0] == 8:
        assert torch.equal(found[2].flatten().sort().values, x[2].flatten().sort().values)


def test_a_layer_that_runs_twice_counts_a_sample_once() -> None:
    net = lq.quantize(nn.Sequential(nn.Linear(4, 4)), "w8a16")
    before = Watch(find_probes(net))
    after_batches: Iterator[Tensor] = iter([torch.full((8, 4), 9.0)])
    with before.hooked():
        before.start(torch.rand(8, 4), 0)
        net(torch.rand(8, 4))
    after = Watch(before.probes, before)
    with after.hooked():
        x = next(after_batches)
        after.start(x, 0)
        net(x)
        net(2 * x)
        net(x[:2])  # a part of the batch: no longer told apart
    assert after.seen["0"].records[0].tolist() == [[9.0, 18.0, 72.0, 72.0]]
    assert after.seen["0"].beyond.tolist() == [1, 1, 1, 1]


def test_tokens_of_a_set() -> None:
    one, two = Samples(), None
    one.add(torch.tensor([[1, 2], [1, 3]]), 0)
    two = Samples(one)
    two.add((torch.tensor([[1, 9], [9, 2], [1, 2]]), torch.zeros(3)), 0)
    found = token_coverage(one, two)
    assert found is not None
    assert (found.unseen, found.split_unseen, found.most_frequent) == (2 / 6, 2 / 4, ((9, 2),))
    assert [sample.new_tokens for sample in two.samples] == [True, True, False]
    assert not found.is_new
