"""Bias correction (Nagel et al. 2019, arXiv:1906.04721, section 4.2): take the mean of what rounding did to an output out of it.

The empirical variant (appendix D): both means are measured on calibration data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_quant.algorithms.base import Algorithm, Cost
from lightning_quant.blocks import Unit
from lightning_quant.calibration import all_reduce, has_ranks
from lightning_quant.nn import FakeModule
from lightning_quant.outputs import summing_outputs, why_no_bias

_WHAT = "bias_correction: not corrected"


@contextlib.contextmanager
def _quantizing(unit: Unit) -> Iterator[None]:
    """All of a unit's modules run quantized."""
    parts = [(part, part.quantizing) for module in unit.modules.values() for _, part in module.quantizers()]
    try:
        for part, _ in parts:
            part.quantizing = True
        yield
    finally:
        for part, before in parts:
            part.quantizing = before


def _execution_order(unit: Unit, names: list[str]) -> list[str]:
    """In which order layers run; first come, first served."""
    order: dict[str, None] = {}
    handles = []
    for name in names:
        see = lambda _, args, name=name: order.setdefault(name)  # noqa: E731
        handles.append(unit.modules[name].register_forward_pre_hook(see))
    try:
        if unit.calls is not None and len(unit.calls):
            unit.output(0)
        else:
            unit.replay()
    finally:
        for handle in handles:
            handle.remove()
    found = [*order, *(name for name in names if name not in order)]
    if has_ranks():
        dist.broadcast_object_list(found, 0)
    return found


def _mean_output(unit: Unit, module: FakeModule) -> Tensor | None:
    """The mean of each channel of a layer's output as the unit runs now, `[channels]`; None: it was not reached."""
    with summing_outputs({"": module}) as sums:
        unit.replay()
    return sums[""][:-1] / sums[""][-1] if sums else None


def _error(unit: Unit) -> float | None:
    """The squared error of the unit's output; None: no float output is known."""
    if unit.targets is None or unit.calls is None:
        return None
    total = torch.zeros((), dtype=torch.float64)
    for index in range(len(unit.calls)):
        total += (unit.output(index).float() - unit.targets[index].float()).square().sum().double().cpu()
    if has_ranks():
        total = total.float().to(next(unit.root.parameters()).device)
        all_reduce(total, "sum")
    return float(total)


def shift_bias(module: FakeModule, shift: Tensor) -> None:
    """Add to a layer's bias, in a new tensor; a layer without a bias gets one.

    Args:
        shift: `[channels]`.
    """
    bias, weight = module._parameters.get("bias"), module.get_weight("weight")
    if bias is None:
        module.register_parameter("bias", nn.Parameter(shift.to(weight.dtype), weight.requires_grad))
    else:
        bias.data = (bias.data.float() + shift).to(bias.dtype)


@torch.no_grad()
def apply_bias_correction(unit: Unit) -> None:
    """Take the mean error of the outputs of a unit's layers out of their biases, layer by layer. Others are noted.

    A correction after which the unit's output is farther from the float one is taken back, and noted.
    """
    means = unit.statistics.get("outputs", {})
    names = []
    for name, module in unit.modules.items():
        reason = why_no_bias(module) or ("" if name in means else "calibration has not reached it")
        if reason:
            unit.note(name, f"{_WHAT}, {reason}")
        else:
            names.append(name)
    if not names:
        return
    with _quantizing(unit):
        error = _error(unit)
        for name in _execution_order(unit, names):
            module = unit.modules[name]
            mean = _mean_output(unit, module)
            if mean is None:
                unit.note(name, f"{_WHAT}, calibration has not reached it")
                continue
            before = module._parameters.get("bias")
            value = None if before is None else before.data
            shift_bias(module, means[name][:-1] / means[name][-1] - mean)
            after = _error(unit)
            if error is not None and after is not None and after > error:
                module._parameters["bias"] = before
                if before is not None and value is not None:
                    before.data = value
                unit.note(name, f"{_WHAT}, the output of {unit.name} would come out farther from the float one")
            else:
                error = after


BIAS_CORRECTION = Algorithm(
    apply_bias_correction,
    "correction",
    ("outputs",),
    reconstructs=True,
    cost=Cost(passes=lambda options, batches, positions, layers: 2.0 * layers),
)
