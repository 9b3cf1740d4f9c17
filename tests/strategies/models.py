"""What the cells are made of: a model in the shapes that strategies want it, data, and comparisons to the bit."""

from __future__ import annotations

import copy
import os
from functools import cache
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, Subset

import lightning_quant as lq
from lightning_quant.sharding import plain_copy
from tests.digits import Classifier, Digits, Net

BATCH, CALIBRATION = 64, 3
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

State = dict[str, Tensor]


# --- model and data -------------------------------------------------------------------------------------------------


class Data(Digits):
    def calibration_dataloader(self) -> DataLoader:
        return DataLoader(self.train, BATCH)


class Model(Classifier):
    """Digits, with noise on the images to train on: a resumed run goes on as before only with the same random numbers."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images + 0.05 * torch.randn_like(images)), labels)


class Sharded(Model):
    """Layers in __init__, sharded in configure_model: a part as one, the leaves of another, and the rest."""

    policy = MixedPrecisionPolicy()
    ignores_frozen = False

    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(self.net, FSDPModule):
            return
        net, mesh = self.net, self.device_mesh["data_parallel"]
        for part in (net.stem, *net.shortcut, net.conv2, net.head, net):
            frozen = {value for value in part.parameters() if self.ignores_frozen and not value.requires_grad}
            fully_shard(part, mesh=mesh, mp_policy=self.policy, ignored_params=frozen or None)


def late_net() -> Net:
    """Trains from scratch in a few batches: its BatchNorms keep up."""
    net = Net()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.5
    return net


class Late(Model):
    """Layers made in configure_model; under FSDP2 on the meta device, where the user prepares and shards them."""

    prepares = True

    def __init__(self, lr: float = 5e-3) -> None:
        super().__init__(lr)
        self.net = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        if self.device_mesh is None:
            self.net = late_net()
            return
        with torch.device("meta"):
            self.net = late_net()
        if self.prepares:
            lq.prepare(self, "w8a8", method="lsq")
        for part in (self.net.stem, self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class NeverPrepared(Late):
    prepares = False


class Stop(L.Callback):
    """Ends the training after its first epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


@cache
def data() -> Digits:
    digits = Data(BATCH)
    digits.setup("fit")
    return digits


@cache
def float_weights() -> State:
    """A float model, trained in every process alike."""
    L.seed_everything(0, verbose=False)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for epoch in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.4**epoch
        for images, labels in data().train_dataloader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.state_dict()


def rank_batches() -> list[list[Any]]:
    """The validation batches of each rank, as Lightning's distributed sampler deals them."""
    val = data().val
    return [list(DataLoader(Subset(val, range(rank, len(val), WORLD)), 250)) for rank in range(WORLD)]


@cache
def calibrated_alone() -> State:
    """What one process packs that sees the calibration batches of all ranks; to be called before there are ranks."""
    assert not dist.is_initialized()
    train = data().train
    loaders = [DataLoader(Subset(train, range(rank, len(train), WORLD)), BATCH) for rank in range(WORLD)]
    model = Model()
    model.load_state_dict(float_weights())
    batches = [images for loader in loaders for images, _ in list(loader)[:CALIBRATION]]
    return dict(lq.quantize(model, lq.Recipe("w8a8", observer="minmax"), batches).state_dict())


@torch.no_grad()
def logits(model: nn.Module, precision: str) -> Tensor:
    """What a plain model computes for all validation data in this process alone, in the Trainer's precision."""
    model = copy.deepcopy(model).eval()
    if precision == "bf16-true":
        model = model.to(torch.bfloat16)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        return torch.cat([model(images.to(dtype)).float() for batches in rank_batches() for images, _ in batches])


def accuracy(model: nn.Module, precision: str) -> float:
    labels = torch.cat([labels for batches in rank_batches() for _, labels in batches])
    return (logits(model, precision).argmax(1) == labels).double().mean().item()


# --- comparisons ----------------------------------------------------------------------------------------------------


def bits(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""


def differences(one: State, two: State) -> list[str]:
    """The names of the tensors in which two states differ in a single bit."""
    return [
        name
        for name in sorted({*one, *two})
        if name not in one or name not in two or one[name].dtype != two[name].dtype or bits(one[name]) != bits(two[name])
    ]


def differs_on_ranks(state: State) -> list[str]:
    """The names of the tensors that rank 0 has otherwise."""
    if WORLD == 1:
        return []
    first = [dict(state)]
    dist.broadcast_object_list(first, 0)
    return differences(first[0], state)


def whole_state(host: L.Trainer) -> State:
    """All that a run ends with: weights, scales, observers, optimizer, random numbers."""
    state = dict(plain_copy(host.lightning_module).state_dict())
    optimizer = getattr(host.optimizers[0], "_optimizer", host.optimizers[0])
    options = StateDictOptions(full_state_dict=True)
    for name, values in get_optimizer_state_dict(host.strategy.model, optimizer, options=options)["state"].items():
        state.update({f"optimizer.{name}.{key}": value for key, value in values.items()})
    return {**state, "random": torch.get_rng_state(), "step": torch.tensor(host.global_step)}


def packed_state(packed: L.LightningModule) -> State:
    return dict(plain_copy(packed).state_dict())
