"""Learned scales get groups of their own, whatever configure_optimizers has made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq
from lightning_quant.scale_groups import ScaleGroups
from lightning_quant.surgery import learned_parameters
from tests.digits import trainer

FACTOR = 0.1


class Net(L.LightningModule):
    """Its optimizer and schedule are given, and how parameters are handed to the optimizer."""

    def __init__(self, schedule: Any = None, optimizer: Any = torch.optim.SGD, mode: str = "plain") -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.schedule, self.optimizer, self.mode = schedule, optimizer, mode

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = self.layers(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        params: Any = self.parameters()
        if self.mode == "named":
            params = self.named_parameters()
        elif self.mode == "layers":
            params = [{"params": layer.parameters(), "lr": 0.1 / (n + 1)} for n, layer in enumerate(self.layers[::2])]
        elif self.mode == "grouped":
            params = lq.param_groups(self, lr=0.1, weight_decay=0.5)
        optimizer = self.optimizer(params, lr=0.1, weight_decay=0.5)
        if self.schedule is None:
            return optimizer
        extra = {"monitor": "loss"} if self.schedule is SCHEDULES["plateau"] else {}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step", **extra}}


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(24, 6, generator=torch.Generator().manual_seed(0))), 4)


SCHEDULES: dict[str, Any] = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (step + 1)),
    "multiplicative": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: schedules.StepLR(o, 2),
    "multistep": lambda o: schedules.MultiStepLR(o, [3]),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 6),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 4),
    "onecycle": lambda o: schedules.OneCycleLR(o, 0.3, total_steps=20),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 3),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.8),
    "polynomial": lambda o: schedules.PolynomialLR(o, 8),
    "constant": lambda o: schedules.ConstantLR(o, 0.5, 2),
    "linear": lambda o: schedules.LinearLR(o, 0.5, 1.0, 4),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0, threshold=1e9, min_lr=0.01),
    "sequential": lambda o: schedules.SequentialLR(o, [schedules.ConstantLR(o, 0.1, 2), schedules.StepLR(o, 1, 0.5)], [2]),
    "chained": lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o, 0.1, 2), schedules.StepLR(o, 1, 0.5)]),
}


class Rates(L.Callback):
    """The rates of both groups at every batch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.parametrize("name", SCHEDULES)
def test_scales_follow_every_schedule_and_a_resumed_run_goes_on(name: str, tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None, **options: Any) -> tuple[Rates, Any, Net]:
        torch.manual_seed(0)
        rates, model = Rates(), Net(SCHEDULES[name], torch.optim.SGD if name != "onecycle" else torch.optim.Adam)
        host = trainer(epochs, lq.QATCallback("w4a4", method="lsq", **options), rates)
        host.fit(model, loader(), ckpt_path=resume, weights_only=True if resume else None)
        return rates, host, model

    plain = run(2)[0]
    split, _, model = run(2, scale_lr=FACTOR)
    assert len(split.seen) == 12
    assert len({rates[0] for rates in split.seen}) > 1
    for own, rates in zip(plain.seen, split.seen):
        assert rates == pytest.approx([own[0], own[0] * FACTOR])
    _, first, _ = run(1, scale_lr=FACTOR)
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed, again, other = run(2, tmp_path / "last.ckpt", scale_lr=FACTOR)
    assert resumed.seen == split.seen[6:]
    for key, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert [len(group["params"]) for group in again.optimizers[0].param_groups] == [6, len(learned_parameters(model))]


@pytest.mark.parametrize("mode", ["plain", "named", "layers", "grouped"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_groups(mode: str, optimizer: Any) -> None:
    model = Net(mode=mode, optimizer=optimizer)
    host = trainer(1, lq.QATCallback("w4a4", method="ewgs", scale_lr=FACTOR))
    host.fit(model, loader())
    groups, learned = host.optimizers[0].param_groups, learned_parameters(model)
    assert len(groups) == {"layers": 6}.get(mode, 2)
    assert sorted(id(value) for group in groups for value in group["params"]) == sorted(id(value) for value in model.parameters())
    for number, group in enumerate(groups):
        mine = {id(value) in learned for value in group["params"]}
        scales = number >= len(groups) // 2
        assert mine == {scales}
        rate = 0.1 / (number % (len(groups) // 2) + 1)
        assert group["lr"] == pytest.approx(rate * FACTOR if scales else rate)
        assert group["weight_decay"] == (0 if scales else 0.5)
    if mode == "named":
        assert [len(group["param_names"]) for group in groups] == [len(group["params"]) for group in groups]


@pytest.mark.parametrize("name", ["cosine", "lambda", "onecycle"])
def test_a_float_run_resumes_into_split_groups(name: str, tmp_path: Path) -> None:
    first = trainer(1)
    first.fit(Net(SCHEDULES[name], torch.optim.AdamW), loader())
    first.save_checkpoint(tmp_path / "float.ckpt")
    rates = Rates()
    host = trainer(2, lq.QATCallback("w4a4", method="lsq", scale_lr=FACTOR), rates)
    host.fit(Net(SCHEDULES[name], torch.optim.AdamW), loader(), ckpt_path=tmp_path / "float.ckpt", weights_only=True)
    whole = Rates()
    trainer(2, whole).fit(Net(SCHEDULES[name], torch.optim.AdamW), loader())
    assert len(rates.seen) == 6
    for (own,), (rate, scale_rate) in zip(whole.seen[6:], rates.seen):
        assert rate == pytest.approx(own)
        assert scale_rate == pytest.approx(own * FACTOR)


def test_two_optimizers() -> None:
    class Two(Net):
        automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
            for optimizer in self.optimizers():
                loss = self.layers(batch[0]).square().mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.layers[0].parameters(), 0.1), torch.optim.Adam(self.layers[2:].parameters(), 0.01)]

    host = trainer(1, lq.QATCallback("w4a4", method="lsq", scale_lr=0.5))
    host.fit(Two(), loader())
    assert [[group["lr"] for group in each.param_groups] for each in host.optimizers] == [[0.1, 0.05], [0.01, 0.005]]


class Custom:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_what_cannot_be_split_is_named(tmp_path: Path) -> None:
    class Partly(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.layers[0].weight], 0.1)

    class Searching(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    class Foreign(Net):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()

    callback = lq.QATCallback("w4a4", method="lsq", scale_lr=FACTOR)
    for model, message in ((Partly(), "no learned scale"), (Searching(), "LBFGS"), (Foreign(Custom), "Custom.*param_groups")):
        with pytest.raises(MisconfigurationException, match=f"scale_lr: .*{message}"):
            trainer(1, callback).fit(model, loader())
    for options in ({"scale_lr": 0.0, "method": "lsq"}, {"scale_lr": 0.1}, {"scale_lr": 0.1, "method": "dorefa"}):
        with pytest.raises(MisconfigurationException, match=r"scale_lr=0.*positive factor"):
            lq.QATCallback("w4a4", **options)
    first = trainer(1, lq.QATCallback("w4a4", method="lsq"))
    first.fit(Net(), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match=r"scale_lr=0.1: the checkpoint was made with None"):
        trainer(2, callback).fit(Net(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_a_group_of_scales_alone_is_brought_down_with_its_schedule() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    lq.prepare(model, "w8a8", method="lsq")
    optimizer = torch.optim.SGD(lq.param_groups(model, lr=0.1, weight_decay=0.5), 0.1)
    schedule = schedules.CosineAnnealingLR(optimizer, 10)
    ScaleGroups(model, [optimizer], [schedule], FACTOR)
    for _ in range(7):
        optimizer.step()
        schedule.step()
        assert schedule.get_last_lr()[1] == pytest.approx(schedule.get_last_lr()[0] * FACTOR)
        assert optimizer.param_groups[1]["lr"] == schedule.get_last_lr()[1]
