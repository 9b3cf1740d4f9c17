"""Static ranges of activations after transforms have moved them."""

from __future__ import annotations

import torch

from lightning_quant.blocks import Unit
from lightning_quant.calibration import all_reduce, has_ranks
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.observers import MinMaxObserver


@torch.no_grad()
def find_ranges(unit: Unit) -> None:
    """Give a unit's static activations their ranges, from the known ends of each channel or else from one more pass."""
    static = [
        (name, part, role)
        for name, module in unit.modules.items()
        for role, part in module.quantizers()
        if not part.is_weight and not part.spec.dynamic and not part.has_range
    ]
    left: list[FakeQuantize] = []
    for name, part, role in static:
        ends = [unit.statistics.get(end, {}).get(name) for end in ("low", "high")]
        if role == "input" and type(part.observer) is MinMaxObserver and ends[0] is not None and ends[1] is not None:
            part.observe(torch.stack([ends[0], ends[1]]))
            part.update_qparams()
        else:
            left.append(part)
    if not left:
        return
    for part in left:
        part.observing = True
    unit.replay()
    for part in left:
        part.observing = False
        if has_ranks():
            part.observer.all_reduce(all_reduce)
            part._stale = True
        part.update_qparams()
