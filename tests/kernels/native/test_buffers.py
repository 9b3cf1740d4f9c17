"""Memory is used again when nothing refers to it any more, and only then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibration import set_flags
from lightning_quant.kernels import native
from lightning_quant.kernels.native import buffers, fake
from lightning_quant.surgery import prepare

pytestmark = pytest.mark.skipif(buffers._uses is None, reason="this torch does not tell how often a storage is used")

HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda tensor: tensor,
    "a view": lambda tensor: tensor[1:3],
    "detached": lambda tensor: tensor.detach(),
    "numpy": lambda tensor: tensor.numpy(),
    "a storage": lambda tensor: tensor.untyped_storage(),
    "autograd": lambda tensor: torch.ones((), requires_grad=True) * tensor,
    "a parameter": nn.Parameter,
    "its data": lambda tensor: nn.Parameter(tensor).data,
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    buffers.clear()


def big() -> Tensor:
    return torch.zeros(256, 256)


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_is_held_is_not_used_again(holder: str) -> None:
    made = buffers.empty_like(big())
    address = made.data_ptr()
    held = HOLDERS[holder](made)
    del made
    assert buffers.empty_like(big()).data_ptr() != address
    del held
    again = {other.data_ptr() for other in [buffers.empty_like(big()) for _ in range(buffers.COUNT)]}
    assert address in again


@pytest.mark.parametrize("dtype", fake.DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_lies_as_the_tensor_does(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    for size in (64, 48, 40):  # the same block, more than half of it full
        x = torch.zeros(8, 16, size, size, dtype=dtype).to(memory_format=memory_format)
        made = buffers.empty_like(x)
        assert (made.shape, made.stride(), made.dtype) == (x.shape, x.stride(), x.dtype)
        made.fill_(3.0)
        assert not made.requires_grad
        assert bool((made == 3.0).all())


@pytest.mark.parametrize("size", [buffers.SMALLEST - 4, buffers.LARGEST + 4])
def test_small_and_huge_ones_are_allocated(size: int) -> None:
    made = buffers.empty_like(torch.empty(size // 4))
    assert made.untyped_storage().nbytes() == size
    assert not buffers._blocks.blocks


def test_a_small_one_does_not_take_a_big_block() -> None:
    del (made := [buffers.empty_like(torch.zeros(1 << 20))])[:]
    assert not made
    small = buffers.empty_like(torch.zeros(1 << 16))
    assert small.untyped_storage().nbytes() == 1 << 18


def test_blocks_are_few_and_held_ones_make_room() -> None:
    held = [buffers.empty_like(big()) for _ in range(3 * buffers.COUNT)]
    assert len(buffers._blocks.blocks) == buffers.COUNT
    assert len({made.data_ptr() for made in held}) == len(held)
    address = buffers.empty_like(big()).data_ptr()
    assert buffers.empty_like(big()).data_ptr() == address
    buffers.clear()
    assert not buffers._blocks.blocks


def test_threads_have_their_own() -> None:
    made = buffers.empty_like(big())
    address, found = made.data_ptr(), []
    del made
    keeper = [buffers.empty_like(big())]
    assert keeper[0].data_ptr() == address
    keeper.clear()
    other = threading.Thread(target=lambda: found.append(len(buffers._blocks.blocks)))
    other.start()
    other.join()
    assert found == [0]
    assert len(buffers._blocks.blocks) == 1


class Net(nn.Module):
    """Activations and weights that are large enough."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16 * 256, 40)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.second(self.first(x).relu())).relu().flatten(1))
        return out


def train(method: str, held: list[Tensor]) -> list[Tensor]:
    """Three steps; what is quantized and gradients go to `held`, and copies of them are returned."""
    model, copies = Net(), []
    prepare(model, "w4a4", method=method)
    set_flags(model, observing=True, following=True, quantizing=True)

    def keep(tensor: Tensor) -> None:
        held.append(tensor)
        copies.append(tensor.detach().clone())

    for module in model.modules():
        if isinstance(module, lq.fake_quant.FakeQuantize):
            module.register_forward_hook(lambda module, args, out: keep(out.detach()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(8, 3, 16, 16, generator=generator).requires_grad_()
        model(x).square().mean().backward()
        optimizer.step()
        for parameter in model.parameters():
            assert parameter.grad is not None
            keep(parameter.grad)
    return [*copies, *(parameter.detach() for parameter in model.parameters())]


@pytest.mark.skipif(native.library() is None, reason="needs the C library")
@pytest.mark.parametrize("method", ["ste", "lsq", "lsq+"])
@pytest.mark.parametrize("holds", [False, True])
def test_training_does_not_change(method: str, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALLEST", 64)
    taken: list[int] = []
    take = buffers._Blocks.take
    monkeypatch.setattr(buffers._Blocks, "take", lambda self, size: taken.append(size) or take(self, size))
    held: Any = [] if holds else _Forgets()
    found = train(method, held)
    assert taken
    for tensor, copy in zip(held, found, strict=False):
        assert torch.equal(tensor, copy)  # nothing that somebody has was written over
    monkeypatch.setattr(buffers, "LARGEST", 0)
    wanted = train(method, _Forgets())
    assert len(found) == len(wanted)
    for mine, other in zip(found, wanted, strict=True):
        assert torch.equal(mine, other)


class _Forgets(list[Any]):
    def append(self, value: Any) -> None:
        pass


def test_the_end_of_a_fit_gives_them_back() -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Tensor) -> Tensor:
            if self.trainer.global_step:
                seen.append(len(buffers._blocks.blocks))
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    seen: list[int] = []
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lq.Trainer(max_steps=2, enable_model_summary=False, callbacks=[lq.QATCallback("w8a8")], **quiet)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(32, 3, 16, 16), batch_size=16))
    assert native.library() is None or seen[0] > 0
    assert not buffers._blocks.blocks
