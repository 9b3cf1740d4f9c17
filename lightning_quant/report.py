"""What quantization did to a model, module by module: `summary`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from lightning_quant.nn import FakeModule, PackedModule, lookup
from lightning_quant.nn.folding import FoldableModule
from lightning_quant.plan import Plan, model_bytes, tensor_bytes
from lightning_quant.spec import QuantScheme
from lightning_quant.surgery import fake_modules, get_info, packed_modules


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as aligned text."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([padded[0], "  ".join("-" * width for width in widths), *padded[1:]])


@dataclass(frozen=True)
class Row:
    """One module: `bits` a weight including scales, and its weights' bytes in float and packed."""

    name: str
    type: str
    scheme: str
    bits: float
    bytes_before: int
    bytes_after: int
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """The modules that are quantized, and those that are not with the reason. Prints as a table.

    Args:
        rows: one a module.
        skipped: module -> why it is in float, or why its BatchNorm was not folded.
        bytes_before, bytes_after: of the whole model's parameters and buffers.
    """

    rows: list[Row]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        cells = [
            (
                row.name or "(root)",
                row.type,
                row.scheme,
                f"{row.bits:.2f}",
                f"{row.bytes_before:,}",
                f"{row.bytes_after:,}",
                row.note,
            )
            for row in self.rows
        ]
        cells += [(name or "(root)", "", "float", "", "", "", reason) for name, reason in self.skipped.items()]
        ratio = self.bytes_after / max(self.bytes_before, 1)
        total = f"whole model: {self.bytes_before:,} -> {self.bytes_after:,} bytes ({ratio:.3f})"
        return table(("module", "type", "scheme", "bits", "bytes before", "after", "note"), cells) + "\n" + total


def float_type_name(module: nn.Module) -> str:
    """The name of the float type that a module is, or was before it was quantized."""
    found = lookup(type(module))
    return found[0].__name__ if found else type(module).__name__


def _packed_tensors(module: PackedModule) -> list[Tensor]:
    ends = ("_packed", "_scale", "_scale_absmax", "_scale_offset", "_zero_point", "_shape")
    return [value for name, value in module.named_parameters(recurse=False) if name.endswith(ends)]


def _row(name: str, kind: str, scheme: QuantScheme, sizes: tuple[int, int, int], note: str) -> Row:
    numel, before, after = sizes
    return Row(name, kind, scheme.label, 8 * after / max(numel, 1), before, after, note)


def _packed_sizes(module: PackedModule) -> tuple[int, int, int]:
    numel = sum(prod(module.packed_shape(name)) for name in module.weight_axes(module))
    return numel, numel * module._float_dtype.itemsize, tensor_bytes(_packed_tensors(module))


def _fake_sizes(module: FakeModule | nn.Module, packed_type: type[PackedModule], scheme: QuantScheme) -> tuple[int, int, int]:
    empty = packed_type.empty(module, scheme, device="meta")
    parts = [part for part in empty.modules() if isinstance(part, PackedModule) and part is not getattr(empty, "out_proj", None)]
    sizes = [_packed_sizes(part) for part in parts]
    return sum(size[0] for size in sizes), sum(size[1] for size in sizes), sum(size[2] for size in sizes)


def summary(model: nn.Module) -> Summary:
    """What is quantized in a prepared or packed model and how, what is not and why; for a prepared model the bytes to come.

    Raises:
        ValueError: the model is not quantized.

    Example:
        >>> from lightning_quant.surgery import prepare
        >>> print(summary(prepare(nn.Sequential(nn.Linear(256, 64), nn.LayerNorm(64)), "w8a16")))
        module  type    scheme           bits  bytes before  after   note
        ------  ------  ---------------  ----  ------------  ------  ----
        0       Linear  w: int8 channel  8.13  65,536        16,656
        whole model: 66,304 -> 17,424 bytes (0.263)
    """
    fakes, packed, info = fake_modules(model), packed_modules(model), get_info(model)
    if not fakes and not packed:
        raise ValueError("the model is not quantized: call lq.quantize, or give it to a Trainer with QATCallback")
    notes, skipped = (info.notes, dict(info.skipped)) if info else ({}, {})
    rows = []
    for name, module in fakes.items():
        rows.append(
            _row(
                name,
                float_type_name(module),
                module.scheme,
                _fake_sizes(module, module.packed_type, module.scheme),
                notes.get(name, ""),
            )
        )
    for name, part in packed.items():
        if part.weight_axes(part):
            rows.append(_row(name, float_type_name(part), part.scheme, _packed_sizes(part), notes.get(name, "")))
    for norm, producer in (info.folded if info else {}).items():
        skipped[norm] = f"BatchNorm folded into {producer}"
    quantizers = [
        tensor for fake in fakes.values() for _, child in fake.quantizers() for tensor in [*child.parameters(), *child.buffers()]
    ]
    now = model_bytes(model) - tensor_bytes(quantizers)
    saved = sum(row.bytes_before - row.bytes_after for row in rows)
    if fakes:
        pairs = [
            (module, module.norm) for module in fakes.values() if isinstance(module, FoldableModule) and module.norm is not None
        ]
        return Summary(rows, skipped, now, now - saved - _folded_bytes(pairs))
    return Summary(rows, skipped, info.float_bytes if info and info.float_bytes else now + saved, now)


def _folded_bytes(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> int:
    """What goes with the BatchNorms of (module, BatchNorm) pairs, less the biases that come instead."""
    gone = 0
    for module, norm in pairs:
        gone += model_bytes(norm)
        if module.bias is None:
            weight: Any = module.weight
            gone -= norm.num_features * weight.element_size()
    return gone


def plan_summary(model: nn.Module, plan: Plan) -> Summary:
    """What a plan will do to a float model, before anything is done."""
    rows = []
    for match in plan.matches:
        sizes = _fake_sizes(match.module, match.entry.packed, match.scheme)
        rows.append(_row(match.name, float_type_name(match.module), match.scheme, sizes, match.note))
    skipped = {**plan.skipped, **{norm: f"BatchNorm to be folded into {producer}" for producer, norm in plan.pairs}}
    modules, before = dict(model.named_modules()), model_bytes(model)
    saved = sum(row.bytes_before - row.bytes_after for row in rows)
    folded = _folded_bytes((modules[producer], modules[norm]) for producer, norm in plan.pairs)
    return Summary(rows, skipped, before, before - saved - folded)
