"""Every configuration compiled for an A100, an H100 and a B200: it fits, spills nothing, and multiplies on tensor cores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_quant.kernels.triton.configs import CONFIGS, Config, pick
from lightning_quant.kernels.triton.support import tile_group, weight_meta
from lightning_quant.numerics import MIN_SCALE
from lightning_quant.spec import PRESETS, QuantSpec
from tests.kernels.triton import only_compiled

only_compiled()
from lightning_quant.kernels.triton import device, fake_quant, int8, quantize, weights  # noqa: E402
from tests.kernels.triton.aot import SHARED, compile_for  # noqa: E402

WEIGHTS = {name: PRESETS[name].scheme.weight for name in ("w8a16", "w4a16", "w3a16", "w2a16", "fp8", "nf4")}
WEIGHTS["w4-asym"] = QuantSpec(4, symmetric=False, granularity="group", group_size=64)
RAGGED = {"w4-group48": QuantSpec(4, symmetric=False, granularity="group", group_size=48), "nf4-flat": WEIGHTS["nf4"]}
WEIGHTS["w5-tensor"] = QuantSpec(5, symmetric=False, granularity="tensor")
INTS = {
    "w8-tensor": QuantSpec(8, symmetric=False, granularity="tensor"),
    "w8": QuantSpec(8),
    "w8-asym": QuantSpec(8, symmetric=False),
    "w4": QuantSpec(4, granularity="group", group_size=128),
}
ROWS = {"small": 16, "medium": 64, "large": 1024, "ragged": 64}
FLOAT_PRODUCTS, INT_PRODUCTS = {"HMMA", "HGMMA", "UTCHMMA"}, {"IMMA", "IGMMA", "UTCIMMA"}


@dataclass(frozen=True)
class Case:
    """A kernel, with one configuration and one kind of arguments."""

    key: tuple[str, str]
    label: str
    kernel: Any
    arguments: dict[str, Any]
    config: Config
    products: frozenset[str] = frozenset()


def fill(kernel: Any, known: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Types of the arguments that are not `known`: sizes that 16 divides, contiguous rows, pointers by their name."""
    unit = {"stride_k": 1, "stride_n": 1}
    plain = dict.fromkeys(("M", "scales", "chunks", "SPLIT"), "i32")
    pointers = {**dict.fromkeys(("words", "zero", "x_zero"), "*i32"), **dict.fromkeys(("codes",), "*i8")}
    pointers |= dict.fromkeys(("scale", "x_scale", "partial", "row_scale", "column_scale", "by_scale", "by_zero"), "*fp32")
    pointers |= dict.fromkeys(("x", "out", "bias", "grad", "by_x"), f"*{dtype}")
    defaults = {**unit, **plain, **pointers, "factor": "fp32"}
    return {name: known.get(name, defaults.get(name, "i32:16")) for name in kernel.arg_names}


def blocks(config: Config) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}


def meta(spec: QuantSpec, columns: int) -> dict[str, Any]:
    known = weight_meta(spec, torch.ones(1), None if spec.symmetric else torch.zeros(1), columns)
    return {**known, **({} if known["ZERO"] else {"zero": None})}


def products(key: tuple[str, str]) -> Iterator[Case]:
    kind, size = key
    columns = 4096 if size != "ragged" else 4080
    for label, spec in (RAGGED if size == "ragged" else WEIGHTS).items():
        config = pick(kind, ROWS[size], columns, tile_group(spec, columns))
        kernel = weights.by_input if kind.startswith("grad") else weights.split if config.split_k > 1 else weights.tiled
        few = label in ("w8a16", "w4a16", "w3a16", "nf4", *RAGGED)
        for dtype in ["fp32"] * few if kind.endswith("fp32") else ["bf16", "fp16"][: 1 + few]:
            for precision in ["ieee", "tf32"] if dtype == "fp32" else ["tf32"]:
                known = {**meta(spec, columns), "PRECISION": precision, "BIAS": True, **blocks(config)}
                expected = frozenset() if precision == "ieee" else FLOAT_PRODUCTS
                yield Case(key, f"{label}-{dtype}-{precision}", kernel, fill(kernel, known, dtype), config, frozenset(expected))


def int_products(key: tuple[str, str]) -> Iterator[Case]:
    for label, spec in INTS.items():
        config = pick("int8", ROWS[key[1]], 4096, tile_group(spec, 4096))
        for x_zero in (False, True):
            known = {**meta(spec, 4096), "X_ZERO": x_zero, "PER_ROW": not x_zero, "SPLIT": config.split_k > 1, "BIAS": True}
            known |= {**blocks(config), **({"out": "*fp32"} if config.split_k > 1 else {})}
            arguments = fill(int8.int8_product, known, "bf16")
            yield Case(key, f"{label}{'-x_zero' * x_zero}", int8.int8_product, arguments, config, frozenset(INT_PRODUCTS))


def others(key: tuple[str, str]) -> Iterator[Case]:
    config = CONFIGS[key]
    if key[0] == "dequantize":
        for label, spec in (RAGGED if key[1] == "ragged" else WEIGHTS).items():
            known = {**meta(spec, 4096 if key[1] == "large" else 4080), "BLOCK_N": config.block_m, "BLOCK_K": config.block_k}
            yield Case(key, label, weights.decode, fill(weights.decode, known, "bf16"), config)
    elif key[0] == "reduce":
        known = {"COLUMN": 2, "ROW": 2, "BIAS": True, "BLOCK": config.block_k}
        yield Case(key, "bf16", device.reduce_partial, fill(device.reduce_partial, known, "bf16"), config)
    elif key[0] == "quantize":
        kernel = quantize.quantize_tokens
        for dynamic, even, fake in ((True, True, False), (True, False, False), (False, False, False), (True, True, True)):
            known = {"DYNAMIC": dynamic, "SYMMETRIC": even, "SIGNED": True, "LOW": -128, "HIGH": 127, "BOUND": 127.0, "SHIFT": 0}
            known |= {"LEAST": MIN_SCALE, "FAKE": fake, "BLOCK": config.block_k, **({"codes": "*bf16"} if fake else {})}
            label = f"{'dynamic' if dynamic else 'static'}{'' if even else '-asym'}{'-fake' * fake}"
            yield Case(key, label, kernel, fill(kernel, known, "bf16"), config)
    else:
        for elements in (32, 128, config.block_k):
            known = {"LOW": -8, "HIGH": 7, "BLOCK_S": config.block_k // elements, "BLOCK_E": elements}
            known |= {"BY_X": True, "BY_SCALE": True, "BY_ZERO": True, "zero": "*i32" if elements == 32 else "*fp32"}
            for kernel in (fake_quant.fake_quantize_forward, fake_quant.fake_quantize_backward):
                yield Case(key, f"{kernel.fn.__name__}-{elements}", kernel, fill(kernel, known, "fp32"), config)


def cases(key: tuple[str, str]) -> list[Case]:
    if key[0].startswith(("weights", "grad")):
        return list(products(key))
    return list(int_products(key) if key[0] == "int8" else others(key))


def check(case: Case, capability: int) -> None:
    compiled = compile_for(case.kernel, case.arguments, case.config.options(), capability)
    used = f"{'/'.join(case.key)} {case.label} sm_{capability}: {compiled}"
    print(used)
    assert compiled.registers <= 255, used
    assert compiled.shared <= SHARED[capability], used
    assert compiled.spills == 0, used
    assert bool(compiled.products & case.products) == bool(case.products), used
    if case.key[1] == "large" and capability >= 90 and case.products == FLOAT_PRODUCTS:
        assert compiled.products & {"HGMMA", "UTCHMMA"}, used  # of the warp group


CASES = [case for key in CONFIGS for case in cases(key)]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{'-'.join(case.key)}-{case.label}")
def test_every_configuration(case, capability):
    check(case, capability)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in CONFIGS if "fp32" not in key[0]], ids="-".join)
def test_sizes_of_one(key):
    """Triton makes a constant of an integer argument that is 1."""
    for case in {case.kernel: case for case in cases(key)}.values():
        sizes = [name for name, kind in case.arguments.items() if str(kind).startswith("i32")]
        assert sizes
        compile_for(case.kernel, {**case.arguments, **dict.fromkeys(sizes, 1)}, case.config.options(), 80)


@pytest.mark.parametrize(
    ("key", "label", "capability"),
    [
        (("weights", "small"), "w4a16-bf16-tf32", 80),
        (("weights", "small"), "w3a16-fp16-tf32", 90),
        (("weights", "large"), "nf4-bf16-tf32", 100),
        (("weights-fp32", "medium"), "w4a16-fp32-tf32", 90),
        (("grad", "large"), "w4-asym-bf16-tf32", 90),
        (("int8", "large"), "w8-x_zero", 80),
        (("int8", "small"), "w4", 90),
        (("quantize", "large"), "dynamic", 90),
        (("fake-quant", "large"), "fake_quantize_backward-128", 80),
    ],
)
def test_a_sample_of_configurations(key, label, capability):
    (case,) = (case for case in cases(key) if case.label == label)
    check(case, capability)


def test_every_entry_is_compiled():
    assert {case.key for case in CASES} == set(CONFIGS)
