"""Speed of packed linear layers on a CPU, against float ones and other libraries' kernels, in one process.

    python benchmarks/kernels.py                                     # a weight of 4096 x 4096, 1 to 1024 rows: ten minutes
    python benchmarks/kernels.py --shape 11008x4096 --rows 1 8 --only "w4|nf4" --json out.json --plot out.png
    python benchmarks/kernels.py --quick                             # does all run, and is it right?

Rows are methods, columns the rows M of the input: how many times as fast as `F.linear` in float32. What is called is what a model
runs: a packed module's forward, or the other library's. A weight's copies, over which calls rotate, exceed the last-level cache
twice, because a model's other layers come in between; `--cached` has one copy. Every output is compared first: with the product of
the weights that the method stores, within what its rounding of inputs and sums may take, and with the float32 product.

"read" is the share of the memory's read bandwidth, measured in the same run, that a method's weight is read with at one row.
`--only` takes a regular expression; float32 always runs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [HERE, *(path for path in sys.path if path != HERE)]

import timing  # noqa: E402

sys.path.remove(HERE)  # the name of this file is a package's, too, which bitsandbytes imports if it finds it

import lightning_quant as lq  # noqa: E402
from lightning_quant.report import table  # noqa: E402

ROWS = (1, 2, 4, 8, 16, 32, 128, 1024)
BASE = "float32 F.linear"
DEFAULTS = timing.Settings(rounds=7, block=0.15, settle=0.08)

# relative errors that rounding may take: of float32 sums; of bfloat16 inputs, weights and outputs; of int8 inputs by token,
# and in one range for all (a normal distribution's, up to 5 sigma in 255 steps); of float8 inputs (3 bits of mantissa)
EXACT, BF16, TOKEN8, TENSOR8, FP8 = 1e-3, 0.01, 0.015, 0.025, 0.04
FLOAT8 = lq.QuantScheme(lq.QuantSpec(8, "float8_e4m3fn"))


@dataclass(frozen=True)
class Ours:
    """A row of ours: its recipe, the input's dtype, and the errors that rounding the input and the whole may have."""

    recipe: str | lq.QuantScheme
    dtype: torch.dtype
    rounding: float
    bound: float


OURS = {
    "w8a16 bf16": Ours("w8a16", torch.bfloat16, BF16, 0.02),
    "fp8 weight-only bf16": Ours(FLOAT8, torch.bfloat16, BF16, 0.04),
    "w4a16 bf16": Ours("w4a16", torch.bfloat16, BF16, 0.13),
    "w4a16 float32": Ours("w4a16", torch.float32, EXACT, 0.13),
    "nf4 bf16": Ours("nf4", torch.bfloat16, BF16, 0.12),
    "w3a16 bf16": Ours("w3a16", torch.bfloat16, BF16, 0.22),
    "w2a16 bf16": Ours("w2a16", torch.bfloat16, BF16, 0.5),
    "w8a8-dynamic float32": Ours("w8a8-dynamic", torch.float32, TOKEN8, 0.02),
    "w8a8 float32": Ours("w8a8", torch.float32, TENSOR8, 0.03),
    "w4a8-dynamic float32": Ours("w4a8-dynamic", torch.float32, TOKEN8, 0.13),
    "fp8 bf16": Ours("fp8", torch.bfloat16, FP8, 0.05),
}


@dataclass
class Method:
    """One way to compute `x @ weight.T`.

    Args:
        runs: the call, one a copy of the weight, each taking the input.
        weight: what the stored weight stands for, float32 `[N, K]`.
        rounding: relative error to the product with `weight` that inputs and sums may have.
        bound: relative error to the float32 product that the whole may have.
        bytes: of the weight as it is stored, scales included.
        prepare: makes its input of a float32 one; not timed.
    """

    runs: list[Callable[[Tensor], Tensor]]
    weight: Tensor
    rounding: float
    bound: float
    bytes: int
    prepare: Callable[[Tensor], Tensor] = field(default=lambda x: x)


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


class Weights:
    """Makes the methods for a weight.

    Args:
        weight: float32 `[N, K]`.
        x: float32 inputs `[M, K]` that calibrate static ranges.
        room: bytes that the copies of a weight fill.
    """

    def __init__(self, weight: Tensor, x: Tensor, room: int) -> None:
        self.weight, self.x, self.room = weight, x, room

    def copies(self, size: int) -> int:
        return max(1, -(-self.room // size))

    def tensors(self, call: Callable[..., Tensor], *stored: Tensor) -> tuple[list[Callable[[Tensor], Tensor]], int]:
        """Calls of `call(x, *stored)`, each with tensors of its own, and the bytes of one's."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in stored)
        sets = [[tensor.clone() for tensor in stored] for _ in range(self.copies(size))]
        return [lambda x, own=own: call(x, *own) for own in sets], size

    def modules(self, module: nn.Module, size: int) -> tuple[list[Callable[[Tensor], Tensor]], int]:
        return [copy.deepcopy(module) for _ in range(self.copies(size))], size

    def linear(self) -> nn.Linear:
        module = nn.Linear(*self.weight.shape[::-1], bias=False)
        module.weight.data.copy_(self.weight)
        return module

    def float32(self) -> Method:
        runs, size = self.tensors(F.linear, self.weight)
        return Method(runs, self.weight, 1e-5, 1e-5, size)

    def bfloat16(self) -> Method:
        runs, size = self.tensors(F.linear, bf16(self.weight))
        return Method(runs, self.weight, BF16, BF16, size, bf16)

    def ours(self, row: Ours) -> Method:
        batches = [self.x] if row.recipe == "w8a8" else None
        model: Any = lq.quantize(nn.Sequential(self.linear()), lq.Recipe(row.recipe), batches).to(row.dtype)
        names = ("weight_packed", "weight_scale", "weight_zero_point")
        size = sum(value.numel() * value.element_size() for name, value in model[0].named_parameters() if name in names)
        runs, size = self.modules(model[0].eval(), size)
        return Method(runs, model[0].dequantized_weight(), row.rounding, row.bound, size, lambda x: x.to(row.dtype))

    def _int8(self) -> tuple[Tensor, Tensor]:
        """Codes and scales by channel."""
        scale = self.weight.abs().amax(1) / 127
        return (self.weight / scale[:, None]).round().to(torch.int8), scale

    def aten_int8(self) -> Method:
        codes, scale = self._int8()
        runs, size = self.tensors(torch._weight_int8pack_mm, codes, bf16(scale))
        return Method(runs, codes * scale[:, None], BF16, 0.02, size, bf16)

    def aten_int4(self, group: int = 128) -> Method:
        """Codes 0 to 15, of which 8 stands for the second of two bfloat16 numbers a group: the scale and the middle."""
        by_group = self.weight.unflatten(1, (-1, group))
        low, high = by_group.amin(-1, keepdim=True), by_group.amax(-1, keepdim=True)
        scale = bf16((high - low) / 15).float()
        middle = bf16(low + 8 * scale).float()
        codes = ((by_group - middle) / scale + 8).round().clamp(0, 15)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).to(torch.int32), 1)
        qparams = bf16(torch.cat([scale, middle], -1).transpose(0, 1)).contiguous()  # [groups, N, 2]
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        runs, size = self.tensors(lambda x, weight, pairs: product(x, weight, group, pairs), packed, qparams)
        return Method(runs, ((codes - 8) * scale + middle).flatten(1), BF16, 0.13, size, bf16)

    def ao_dynamic(self) -> Method:
        """Its int8 weights have one scale, and so have its inputs."""
        torch.backends.quantized.engine = "onednn"
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(self.linear()), {nn.Linear})
        runs, size = self.modules(model[0], self.weight.numel())
        return Method(runs, model[0].weight().dequantize(), TENSOR8, 0.03, size)

    def onednn(self) -> Method:
        """The integer product alone: its inputs are uint8 already, in one range for all."""
        codes, scale = self._int8()
        low, high = float(self.x.min()), float(self.x.max())
        step = (high - low) / 255
        zero, zeros = round(-low / step), torch.zeros(len(scale), dtype=torch.int32)
        product, tail = torch.ops.onednn.qlinear_pointwise, (None, 1.0, 0, torch.float32, "none", [], "")
        size = codes.numel() + 8 * len(scale)
        packed = [torch.ops.onednn.qlinear_prepack(codes, None) for _ in range(self.copies(size))]
        return Method(
            [lambda x, own=own: product(x, step, zero, own, scale, zeros, *tail) for own in packed],
            *(codes * scale[:, None], TENSOR8, 0.03, size),
            lambda x: (x / step + zero).round().clamp(0, 255).to(torch.uint8),
        )

    def bitsandbytes(self) -> Method:
        import bitsandbytes as bnb

        module = bnb.nn.Linear4bit(*self.weight.shape[::-1], bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
        module.weight = bnb.nn.Params4bit(self.weight.clone(), requires_grad=False, quant_type="nf4")
        module = module.to("cpu").eval()
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        runs, size = self.modules(module, self.weight.numel() // 2 + self.weight.numel() // 64 * 4)
        return Method(runs, weight, BF16, 0.12, size, bf16)


def build(weight: Tensor, x: Tensor, room: int, only: str) -> timing.Built:
    """All methods that this machine has and the expression names."""
    of, found = Weights(weight, x, room), timing.Built()
    makers: dict[str, Callable[[], Method]] = {BASE: of.float32, "bf16 F.linear": of.bfloat16}
    makers |= {f"ours {name}": lambda row=row: of.ours(row) for name, row in OURS.items()}
    makers |= {
        "ATen _weight_int8pack_mm bf16": of.aten_int8,
        "ATen _weight_int4pack_mm bf16": of.aten_int4,
        "torch.ao dynamic int8 float32": of.ao_dynamic,
        "oneDNN qlinear uint8 -> float32": of.onednn,
        "bitsandbytes nf4 bf16": of.bitsandbytes,
    }
    for name, make in makers.items():
        if name == BASE or re.search(only, name):
            found.add(name, make, ours=name.startswith("ours") or name == BASE)
    return found


@torch.inference_mode()
def check(methods: timing.Built, weight: Tensor, x: Tensor, rows: Sequence[int]) -> dict[str, float]:
    """Compare every method at all numbers of rows, and call every copy once; drops what cannot run.

    Returns:
        relative errors to float32 by method.

    Raises:
        SystemExit: a method computes something else.
    """
    errors: dict[str, float] = {}
    exact = F.linear(x, weight)
    for name, method in list(methods.items()):
        own = F.linear(x, method.weight)
        method.weight = torch.empty(0)
        worst = 0.0
        for count in rows:
            given = method.prepare(x[:count])
            try:
                out = [run(given) for run in (method.runs if count == rows[0] else method.runs[:1])][-1]
            except (RuntimeError, NotImplementedError) as problem:
                if name.startswith("ours"):
                    raise
                methods.skip(name, str(problem))
                break
            rounding, total = timing.error(out, own[:count]), timing.error(out, exact[:count])
            if not (rounding <= method.rounding and total <= method.bound):
                raise SystemExit(
                    f"{name} at {count} rows is wrong: {rounding:.4f} from its own weights' product (at most {method.rounding}), "
                    f"{total:.4f} from float32 (at most {method.bound})"
                )
            worst = max(worst, total)
        else:
            errors[name] = worst
    return errors


def rotating(method: Method, x: Tensor) -> timing.Call:
    """The method's call on the next copy of its weight."""
    given, turn = method.prepare(x), itertools.cycle(method.runs)
    return lambda: next(turn)(given)


def run_shape(shape: tuple[int, int], args: argparse.Namespace, settings: timing.Settings, bandwidth: float) -> dict[str, Any]:
    """Check and measure all methods for one weight; prints a table."""
    torch.manual_seed(0)
    weight, x = torch.randn(shape) / shape[1] ** 0.5, torch.randn(max(args.rows), shape[1])
    title = f"weight {shape[0]} x {shape[1]}{', cached' if args.cached else ''}"
    print(f"\n{title}", flush=True)
    # --quick does not measure, and many copies of a small weight take long to make
    room = 0 if args.cached else 4 << 20 if args.quick else 2 * timing.cache_bytes()
    methods = build(weight, x, room, args.only)
    errors = check(methods, weight, x, args.rows)
    times: dict[int, timing.Times] = {}
    for count in args.rows:
        calls = {name: rotating(method, x[:count]) for name, method in methods.items()}
        times[count] = timing.measure(calls, settings)
        print(f"  measured {count} rows", flush=True)
    by_rows = {count: timing.ratios(found, BASE) for count, found in times.items()}
    milliseconds = {count: {name: 1e3 * value for name, value in timing.medians(found).items()} for count, found in times.items()}
    shares = {}
    if 1 in times and not args.cached:
        shares = {name: method.bytes / milliseconds[1][name] * 1e3 / bandwidth for name, method in methods.items()}
    lines = [
        (
            *(name, f"{errors[name]:.4f}", f"{method.bytes / 1e6:.1f}", f"{shares[name]:.0%}" if name in shares else ""),
            *(f"{by_rows[count][name]:.2f}" for count in args.rows),
        )
        for name, method in methods.items()
    ]
    lines.append((f"milliseconds of {BASE}", *[""] * 3, *(f"{milliseconds[count][BASE]:.2f}" for count in args.rows)))
    print(
        f"\n{table(('times as fast as float32', 'error', 'MB', 'read', *(f'M={count}' for count in args.rows)), lines)}", flush=True
    )
    return {
        "title": title,
        "shape": shape,
        "cached": args.cached,
        "errors": errors,
        "bytes": {name: method.bytes for name, method in methods.items()},
        "read_share": shares,
        "ratios": by_rows,
        "milliseconds": milliseconds,
        "seconds": times,
        "skipped": methods.skipped,
    }


def draw(shown: Any, results: Sequence[dict[str, Any]]) -> None:
    """Ratio over rows, one line a method, one picture a shape."""
    for axes, result in zip(shown.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        rows = list(result["ratios"])
        for index, name in enumerate(result["errors"]):
            style = {"linestyle": "-" if name.startswith("ours") else "--", "marker": "osv^D"[index % 5], "markersize": 4}
            axes.plot(rows, [result["ratios"][count][name] for count in rows], label=name, **style)
        axes.set(xscale="log", yscale="log", xlabel="rows", ylabel=f"times as fast as {BASE}", title=result["title"])
        axes.set_xticks(rows, [str(count) for count in rows])
        axes.minorticks_off()
        ticks = [value for value in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32) if axes.get_ylim()[0] <= value <= axes.get_ylim()[1]]
        axes.set_yticks(ticks, [f"{value:g}" for value in ticks])
        axes.grid(alpha=0.3)
    shown.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)


def shape_of(text: str) -> tuple[int, int]:
    """`NxK`, K a multiple of 128."""
    match = re.fullmatch(r"(\d+)[x,](\d+)", text)
    if not match or int(match[2]) % 128 or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape NxK with K a multiple of 128, such as 4096x4096")
    return int(match[1]), int(match[2])


def main(given: Sequence[str] | None = None) -> None:
    parser = timing.arguments(__doc__, DEFAULTS)
    parser.add_argument("--shape", type=shape_of, nargs="+", help="NxK: outputs x inputs (default 4096x4096; with --quick 512x512)")
    parser.add_argument("--rows", type=int, nargs="+", help=f"default {' '.join(map(str, ROWS))}; with --quick 1 8 128")
    parser.add_argument("--only", default="", help="methods whose name this regular expression is in")
    parser.add_argument("--cached", action="store_true", help="one copy of each weight, which may stay in the cache")
    args = parser.parse_args(given)
    warnings.filterwarnings("ignore")
    args.shape = args.shape or [(512, 512) if args.quick else (4096, 4096)]
    args.rows = sorted(args.rows or ((1, 8, 128) if args.quick else ROWS))
    settings, about = timing.settings_of(args, DEFAULTS), timing.machine(args.threads)
    print(timing.describe(about))
    bandwidth, how = timing.read_bandwidth(args.threads)
    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s by {args.threads} threads ({how})", flush=True)
    results = [run_shape(shape, args, settings, bandwidth) for shape in args.shape]
    content = {"machine": about, "settings": vars(settings), "bandwidth": bandwidth, "read_by": how, "results": results}
    timing.write_json(args.json, content)
    timing.figure(args.plot, lambda shown: draw(shown, results), (7.0 * len(results) + 2.5, 6.0))


if __name__ == "__main__":
    main()
