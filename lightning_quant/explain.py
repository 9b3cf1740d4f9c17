"""Which kernel runs each packed module, and why: `explain`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_quant.kernels import KERNELS, choose, images, native, onednn
from lightning_quant.nn import PackedModule
from lightning_quant.report import table
from lightning_quant.surgery import packed_modules


@dataclass(frozen=True)
class Choice:
    """One module's kernel.

    Args:
        name, type, scheme: of the module.
        backend: the key in `kernels.KERNELS` that runs it.
        how: what it computes with.
        warning: where that is slow, and the way out; or empty.
        refused: the backends before it -> why they do not run it.
    """

    name: str
    type: str
    scheme: str
    backend: str
    how: str
    warning: str = ""
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """The kernels of a model. Prints as a table, with warnings below it.

    Args:
        rows: one a module.
        machine: the CPU's instruction sets that the package's kernels use.
    """

    rows: list[Choice]
    machine: str

    def __str__(self) -> str:
        lines = [
            table(["module", "type", "scheme", "kernel", "how"], [(r.name, r.type, r.scheme, r.backend, r.how) for r in self.rows])
        ]
        for text in dict.fromkeys(row.warning for row in self.rows if row.warning):
            names = [row.name for row in self.rows if row.warning == text]
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            lines.append(f"warning: {shown}: {text}")
        for reason in dict.fromkeys(f"{name}: {why}" for row in self.rows for name, why in row.refused.items()):
            lines.append(f"not taken: {reason}")
        return "\n".join([*lines, f"CPU kernels: {self.machine}"])


def _choice(name: str, module: PackedModule) -> Choice:
    spec, by_input = module.scheme.weight, module.scheme.input
    assert spec is not None
    weight = next(value for key, value in module._parameters.items() if value is not None and key.endswith("_packed"))
    x = torch.empty(0, dtype=module._float_dtype, device=weight.device)
    backend, refused = choose(module.operator, x, spec, by_input, module.spec_args[2])
    if backend == "cpu" and module.operator == "conv" and not images.refuses(x, spec, by_input):
        geometry: Any = (module.groups, module.transposed)
        reason = images.misfit(module.packed_shape("weight"), *geometry)
        if reason:
            backend, refused = "onednn", {**refused, "cpu": reason}
    if backend == "onednn" and module.operator == "conv":
        reason = onednn.refuses("conv", x, spec, by_input, module.packed_shape("weight"), bool(module.transposed))
        if reason:  # of this geometry
            backend, refused = "reference", {**refused, "onednn": reason}
    how, warning = KERNELS[backend].describe(module.operator, x, spec, by_input)
    if isinstance(module, nn.RNNBase) and module.operator == "linear":
        how, warning = f"step by step: {how}", warning or "one time step after the other: slower than the float layer"
    return Choice(name, type(module).__name__, module.scheme.label, backend, how, warning, refused)


def explain(model: nn.Module) -> Explanation:
    """Which kernel runs each packed module on this machine, why no other, and where that is slower than float.

    Args:
        model: a packed model, on the device and in the dtype that it runs in. `LQ_BACKEND` and `LQ_ISA` count.

    Raises:
        ValueError: the model has no packed module.

    Example:
        >>> import lightning_quant as lq
        >>> packed = lq.quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), "w8a8-dynamic")
        >>> lq.explain(packed).rows[0].scheme
        'w: int8 channel, in: int8 token dynamic'
    """
    modules = packed_modules(model)
    if not modules:
        raise ValueError("explain: the model has no packed module: lq.quantize(model, ...) or convert(model) makes them")
    forced = os.environ.get("LQ_BACKEND")
    machine = native.isa() if native.library() is not None else "the C library is not built (no C compiler at installation)"
    return Explanation(
        [_choice(name, module) for name, module in modules.items()], machine + (f"; LQ_BACKEND={forced}" if forced else "")
    )
