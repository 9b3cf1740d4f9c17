"""Weights that are used several times before they change are quantized once, and nothing else differs."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibration import drop_weights, keep_weights, quantizers, set_flags
from lightning_quant.callbacks import qat
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.kernels import native
from lightning_quant.kernels.native import fake
from lightning_quant.methods import METHODS
from lightning_quant.surgery import prepare
from tests.helpers import assert_same_state

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs the C library")
# methods that do not train the others' scheme
SCHEMES: dict[str, Any] = {name: {"scheme": "w2a16", "symmetric": True} for name in ("ternary", "binary")}


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 4)

    def training_step(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.second(self.first(batch[0]).relu()), batch[1])

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        data = torch.randn(50, 16, generator=generator), torch.randint(4, (50,), generator=generator)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Calls(L.Callback):
    """How often the kernels quantize a weight, at each optimizer step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made, self.steps = 0, [0]
        for name in ("quantize", "quantize_measured"):
            monkeypatch.setattr(fake, name, self.counted(getattr(fake, name)))

    def counted(self, kernel: Any) -> Any:
        def call(x: Tensor, *args: Any, **options: Any) -> Any:
            self.made += tuple(x.shape) in {(24, 16), (4, 24)}
            return kernel(x, *args, **options)

        return call

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if self.made:
            self.steps.append(self.made - sum(self.steps))

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.left = [part.kept.made is not None for part in quantizers(module) if part.kept is not None]


def fit(method: str, accumulate: int, *callbacks: L.Callback, **options: Any) -> Net:
    recipe = lq.Recipe(**SCHEMES.get(method, {"scheme": "w4a8-dynamic"}), edges=None)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    every = [lq.QATCallback(recipe, method=method, **options), *callbacks]  # type: ignore[arg-type]
    model = Net()
    L.Trainer(max_epochs=2, accelerator="cpu", accumulate_grad_batches=accumulate, callbacks=every, **quiet).fit(model)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same_to_the_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = fit(method, 3)
    monkeypatch.setattr(qat, "keep_weights", lambda model, keep: None)
    assert_same_state(kept.state_dict(), fit(method, 3).state_dict())


@pytest.mark.parametrize("options", [{"freeze_observers_at": 0}, {"bits": {0: 8, 1: 4}}, {"quant_noise": 0.5}], ids=str)
def test_schedules_are_the_same_to_the_bit(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    kept = fit("lsq", 3, **options)
    monkeypatch.setattr(qat, "keep_weights", lambda model, keep: None)
    torch.manual_seed(3)
    assert_same_state(kept.state_dict(), fit("lsq", 3, **options).state_dict())


@pytest.mark.parametrize("method", ["ste", "lsq", "ewgs"])
def test_a_weight_is_quantized_once_in_an_optimizer_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    fit(method, 5, calls)  # two epochs of ten batches
    assert len(calls.steps) >= 4
    assert calls.steps[-2:] == [2, 2]  # two layers
    # the last batch ended with a step: nothing stays after it
    assert not any(calls.left)


def test_nothing_is_kept_of_what_is_used_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kepts(L.Callback):
        def __init__(self) -> None:
            self.found: list[Any] = []

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            self.found += [part.kept.made for part in quantizers(module) if part.kept is not None]

    kepts = Kepts()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    model = Net()
    L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[kepts, lq.QATCallback("w4a16")], **quiet).fit(model)
    assert kepts.found == [None] * 20
    assert all(part.kept is None for part in quantizers(model))  # and nothing after the fit


def raw(**options: Any) -> tuple[nn.Module, FakeQuantize]:
    model = nn.Sequential(nn.Linear(16, 8))
    prepare(model, lq.Recipe("w4a16", edges=None), **options)
    set_flags(model, observing=True, following=True, quantizing=True)
    keep_weights(model.train(), True)
    return model, next(part for part in quantizers(model) if part.is_weight)


@pytest.mark.parametrize("options", [{}, {"method": "lsq"}], ids=str)
def test_a_change_is_seen(options: dict[str, Any]) -> None:
    model, part = raw(**options)
    x = torch.randn(3, 16)
    for _ in range(3):
        before = model(x)
    assert part.kept is not None
    assert part.kept.made is not None
    changed = [model[0].weight] + ([part.scale] if part.learned else [])
    for tensor in changed:
        with torch.no_grad():
            tensor.mul_(1.5)
        after = model(x)
        fresh = copy.deepcopy(model)
        keep_weights(fresh, False)
        assert torch.equal(after, fresh(x))
        assert not torch.equal(after, before)
        before = after
    model[0].weight.data *= 2  # not seen by itself
    drop_weights(model)
    assert not torch.equal(model(x), before)


def test_evaluation_neither_keeps_nor_takes() -> None:
    model, part = raw()
    model.eval()
    for _ in range(3):
        model(torch.randn(3, 16))
    assert part.kept is not None
    assert part.kept.made is None
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(3, 16))
    assert part.kept.made is None


def test_a_layer_that_is_used_twice_is_quantized_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    def gradients(keep: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Twice()
        prepare(model, lq.Recipe("w4a16", edges=None), method="lsq")
        set_flags(model, observing=True, following=True, quantizing=True)
        keep_weights(model.train(), keep)
        for _ in range(2):
            model(torch.ones(2, 8)).square().sum().backward()
        (part,) = (one for one in quantizers(model) if one.is_weight)
        assert keep == (part.kept is not None and part.kept.made is not None)
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for kept, plain in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(kept, plain)


def test_copies_keep_nothing() -> None:
    model, part = raw()
    for _ in range(3):
        model(torch.randn(3, 16))
    assert part.kept is not None
    assert part.kept.made is not None
    for other in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert other.kept is None


def test_threads_have_weights_of_their_own() -> None:
    """A model whose weights are kept trains while another one runs."""
    torch.manual_seed(0)
    (one, part), (two, _) = raw(), raw(method="lsq")
    keep_weights(two, False)
    x, wrong, stop = torch.randn(3, 16), [], threading.Event()
    want = two(x)

    def others() -> None:
        while not stop.is_set():
            try:
                wrong.extend([] if torch.equal(two(x), want) else ["value"])
            except Exception as error:
                wrong.append(repr(error))

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(300):
            for _ in range(3):
                one(x)
            drop_weights(one)
    finally:
        stop.set()
        thread.join()
    assert part.kept is not None
    assert wrong == []
