"""QAT at 4 bits keeps what PTQ loses: a convolutional network, a vision transformer and an LSTM on real digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from tests.digits import Classifier, Digits, Net, accuracy, trainer

WITHIN, EPOCHS = 1.5, 6
# with the first and the last layer at 8 bits, rounding costs these networks one or two images in 500: nothing to win back
W4A4 = lq.Recipe("w4a4", edges=None)


class ViT(nn.Module):
    """16 patches of 2 x 2 pixels, two blocks, the mean of all tokens (Dosovitskiy et al. 2021, arXiv:2010.11929, in small)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(torch.randn(16, width) * 0.1)
        block = [nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(2)]
        self.blocks, self.norm, self.head = nn.Sequential(*block), nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch(x).flatten(2).transpose(1, 2) + self.position)).mean(1))


class Rows(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Linear(8, width), nn.LSTM(width, width, batch_first=True)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.lstm(torch.relu(self.embed(x[:, 0])))[0][:, -1])))


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {"cnn": (Net, 8), "vit": (ViT, 15), "lstm": (Rows, 15)}


class Model(Classifier):
    def __init__(self, make: Callable[[], nn.Module], lr: float = 5e-3) -> None:
        super().__init__(lr)
        self.net = make()


_trained: dict[str, dict[str, Tensor]] = {}


def start(name: str, lr: float = 2e-3) -> Model:
    """The float model, trained once a session."""
    make, epochs = NETS[name]
    if name not in _trained:
        torch.manual_seed(0)
        model = Model(make)
        trainer(epochs).fit(model, datamodule=Digits())
        _trained[name] = {key: value.clone() for key, value in model.state_dict().items()}
    model = Model(make, lr)
    model.load_state_dict(_trained[name])
    return model


def after_qat(name: str, method: Any) -> float:
    torch.manual_seed(0)
    host = trainer(EPOCHS, lq.QATCallback(W4A4, method=method, scale_lr=0.1, freeze_bn_at=0.8))
    host.fit(start(name), datamodule=Digits())
    return accuracy(host.quantize())


def after_ptq(name: str) -> float:
    settings = lq.Recipe("w4a4", edges=None, observer="mse", weight_observer="mse")
    return accuracy(trainer().quantize(start(name), datamodule=Digits(), recipe=settings))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", ["lsq", "ewgs"])
def test_w4a4(name: str, method: str) -> None:
    before, rounded = accuracy(start(name)), after_ptq(name)
    got = after_qat(name, method)
    print(f"{name} {method}: float {before:.1f}, PTQ {rounded:.1f}, QAT {got:.1f}")
    assert before > 90
    assert got >= before - WITHIN
    assert got > rounded
