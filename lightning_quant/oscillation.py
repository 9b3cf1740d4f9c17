"""Weights that oscillate between two codes in QAT: held, or damped (Nagel et al. 2022, arXiv:2203.11086)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.gradients import nearest_level
from lightning_quant.nn import FakeModule
from lightning_quant.numerics import dequantize, quantize
from lightning_quant.surgery import fake_modules

KINDS = ("freeze", "dampen")
# of the running averages of codes and of oscillations (section 4.3; the paper's experiments have 0.01)
MOMENTUM = 0.01
# the threshold starts at so many times what it ends at (the paper's annealing, section 5.3, from 0.04 to 0.01)
_EASE = 4.0


def _trained(model: nn.Module) -> Iterator[tuple[str, FakeModule, str, FakeQuantize]]:
    """Weights that are quantized and trained: a key, the module, the weight's name and its quantizer."""
    for key, fake in fake_modules(model).items():
        for name in fake.weight_axes(fake):
            quantizer = getattr(fake, f"{name}_fake_quant")
            with torch.enable_grad():  # elsewhere a part of a parameter tells nothing
                trained = fake.get_weight(name).requires_grad and not fake.adapter
            if trained and quantizer.quantizing and quantizer.has_range and quantizer.spec.is_int:
                yield f"{key}.{name}" if key else name, fake, name, quantizer


def _codes(fake: FakeModule, name: str, quantizer: FakeQuantize) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of a weight as it is now, its scale and its zero point."""
    weight, scale, zero_point = fake.weight_on_grid(name)
    return quantize(weight, scale, zero_point, quantizer.spec, quantizer.axis), scale, zero_point


def _values(codes: Tensor, scale: Tensor, zero_point: Tensor, fake: FakeModule, name: str, quantizer: FakeQuantize) -> Tensor:
    """The float weight that has these codes, in the middle of each."""
    return fake.latent_weight(name, dequantize(codes, scale, zero_point, quantizer.spec, quantizer.axis))


# --- freezing -----------------------------------------------------------------------------------------------------------


def start_track(codes: Tensor) -> dict[str, Tensor]:
    """The state of one weight before its first step; every tensor in the weight's shape.

    Args:
        codes: of the weight, int8 or uint8.
    """
    return {
        "codes": codes.clone(),
        "direction": torch.zeros_like(codes, dtype=torch.int8),
        "frequency": torch.zeros_like(codes, dtype=torch.float32),
        "average": codes.float(),
        "frozen": torch.zeros_like(codes, dtype=torch.bool),
    }


def advance(track: dict[str, Tensor], codes: Tensor, threshold: float, levels: tuple[int, ...] | None = None) -> None:
    """Take in the codes after a step, in place (section 4.3, algorithm 1).

    A code oscillates if it moves against its last move. A weight whose running frequency of that exceeds the threshold is held at
    its running average, rounded to a code in use.

    Args:
        levels: the codes in use; None: every one.

    Example:
        >>> track = start_track(torch.zeros(1, dtype=torch.int8))
        >>> for code in (1, 0, 1, 0, 1):
        ...     advance(track, torch.tensor([code], dtype=torch.int8), threshold=0.03)
        >>> track["frozen"].item(), track["codes"].item(), round(track["frequency"].item(), 4)
        (True, 0, 0.0394)
    """
    frozen = track["frozen"]
    codes = torch.where(frozen, track["codes"], codes)
    move = (codes.short() - track["codes"].short()).sign().to(torch.int8)
    turned = (move != 0) & (move == -track["direction"])
    track["frequency"].mul_(1 - MOMENTUM).add_(turned, alpha=MOMENTUM)
    track["average"].mul_(1 - MOMENTUM).add_(codes, alpha=MOMENTUM)
    track["direction"].copy_(torch.where(move != 0, move, track["direction"]))
    stops = (track["frequency"] > threshold) & ~frozen
    middle = track["average"].round() if levels is None else nearest_level(track["average"], levels)
    track["codes"].copy_(torch.where(stops, middle.to(codes.dtype), codes))
    frozen |= stops


class Freezing:
    """Iterative weight freezing: what each weight's codes have done, and which of them are held.

    Args:
        threshold: of the frequency of oscillation, at the end of the training; it starts at 4 times that.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.tracks: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, model: nn.Module, progress: float) -> None:
        """After an optimizer step: count, freeze, and put what is frozen back into the middle of its code.

        Args:
            progress: how much of the training is done, 0 to 1.
        """
        threshold = self.threshold * (1 + (_EASE - 1) * (1 + math.cos(math.pi * progress)) / 2)
        for key, fake, name, quantizer in _trained(model):
            codes, scale, zero_point = _codes(fake, name, quantizer)
            if key not in self.tracks:
                self.tracks[key] = start_track(codes)
                continue
            track = self.tracks[key] = {part: value.to(codes.device) for part, value in self.tracks[key].items()}
            advance(track, codes, threshold, quantizer.levels)
            weight = fake.get_weight(name)
            held = _values(track["codes"], scale, zero_point, fake, name, quantizer).to(weight.dtype)
            weight.copy_(torch.where(track["frozen"], held, weight))

    def share(self) -> float:
        """The fraction of weights that are held."""
        total = sum(track["frozen"].numel() for track in self.tracks.values())
        return sum(int(track["frozen"].sum()) for track in self.tracks.values()) / max(total, 1)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {key: dict(track) for key, track in self.tracks.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracks = {key: {part: value.clone() for part, value in track.items()} for key, track in state.items()}


# --- terms of the loss ------------------------------------------------------------------------------------------------


def dampening(fake: FakeModule, name: str, quantizer: FakeQuantize) -> Tensor:
    """`||w_hat - clip(w)||^2` (section 4.2), with a gradient by w only: weights are drawn to the middle of their code.

    Returns:
        a scalar.
    """
    with torch.no_grad():
        codes, scale, zero_point = _codes(fake, name, quantizer)
        target = _values(codes, scale, zero_point, fake, name, quantizer)
        low, high = quantizer.codes
        ends = [torch.full_like(codes, end) for end in (low, high)]
        lowest, highest = (_values(end, scale, zero_point, fake, name, quantizer) for end in ends)
    weight = fake.get_weight(name).float()
    lowest, highest = torch.minimum(lowest, highest), torch.maximum(lowest, highest)  # a negative fold turns them round
    return (target - weight.clamp(lowest, highest)).square().sum()


@torch.no_grad()
def add_terms(model: nn.Module, optimizer: torch.optim.Optimizer, strength: float) -> None:
    """Add to the gradients of an optimizer's parameters those of the terms that methods and dampening have beside the loss.

    Called with complete gradients, before they are clipped: as if the terms were in the loss, once an optimizer step.

    Args:
        strength: of `dampening`, 0 for none.
    """
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    for fake in fake_modules(model).values():
        for _, quantizer in fake.quantizers():
            trained = quantizer.learned and quantizer.quantizing and quantizer.scale.requires_grad  # QATCallback(train=...) freezes
            if quantizer.rule.regularization and trained and id(quantizer.scale) in held:
                _add(quantizer.scale, 2 * quantizer.rule.regularization * quantizer.scale.detach())
    if not strength:
        return
    for _, fake, name, quantizer in _trained(model):
        parameters = [value for value in fake.parameters(recurse=False) if value.requires_grad and id(value) in held]
        if not parameters:
            continue
        with torch.enable_grad():
            found = torch.autograd.grad(strength * dampening(fake, name, quantizer), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                _add(parameter, gradient)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient.to(parameter.dtype) if parameter.grad is None else parameter.grad.add_(gradient)


def rising(strength: float, progress: float) -> float:
    """From 0 to `strength` along half a cosine (section 5.3).

    Example:
        >>> [round(rising(1.0, progress), 3) for progress in (0, 0.25, 0.5, 1)]
        [0.0, 0.146, 0.5, 1.0]
    """
    return strength * (1 - math.cos(math.pi * min(progress, 1.0))) / 2
