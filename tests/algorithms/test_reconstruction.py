"""The error that learned rounding works against."""

from __future__ import annotations

import torch

from lightning_quant.algorithms.reconstruction import distance
from tests.helpers import assert_close


def test_a_giant_token_does_not_drown_the_others() -> None:
    target = torch.randn(2, 6, 8)
    target[:, 0] *= 1000
    off = target + torch.randn_like(target) * target.square().mean(-1, keepdim=True).sqrt() * 0.1
    assert_close(distance(off, target), ((off - target) / target.square().mean(-1, keepdim=True).sqrt()).square().mean())
    assert distance(target, target) == 0
    assert_close(distance(off[:, 1:], target[:, 1:]) / distance(off, target), torch.tensor(1.0), 0.2)
    for plain in (target[0], target[:, None]):  # samples of features, and images: nothing is known of their size
        assert_close(distance(plain + 0.5, plain), torch.tensor(0.25), 1e-4)
    assert distance(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)) == 0
