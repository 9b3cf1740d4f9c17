"""Imports go strictly down (the design's "Layers"), and importing the package costs and says nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import lightning_quant

PACKAGE = "lightning_quant"
ROOT = Path(lightning_quant.__file__).parent

# from the lowest to the highest; what one pattern matches is one level, and does not import each other
ORDER = [
    *("spec", "recipe"),
    *("numerics", "packing", "double_quant", "sharding"),
    *("kernels.triton.configs", "kernels.triton.support", "kernels.triton.device"),
    "kernels.kept",
    *("kernels.triton.quantize", "kernels.triton.fake_quant", "kernels.triton.weights", "kernels.triton.int8"),
    *("kernels.native.build", "kernels.native", "kernels.native.buffers", "kernels.native.fake", "kernels.cpu_fake_quant"),
    *("grids", "observers.base", "observers.histogram", "observers", "gradients", "functional", "fake_quant", "methods"),
    *("kernels.reference", "kernels.prepack", "kernels.onednn"),
    *(f"kernels.images.{name}" for name in ("graph", "program", "compiler")),
    "kernels.images",
    *("kernels.*", "kernels"),
    *("nn.base", "nn.packed", "nn.fake", "nn.folding", "nn.linear"),
    *("nn.conv", "nn.embedding", "nn.rnn", "nn.attention", "nn.transformers_conv1d"),
    *("nn.experts", "nn.lora", "nn"),
    *("fold", "rescaling", "pairs", "plan", "fitting", "surgery", "scale_groups", "oscillation", "calibration"),
    *("activations", "layout", "blocks", "statistics", "outputs"),
    *("scaling", "algorithms.base", "algorithms.ranges", "algorithms.reconstruction"),
    *("algorithms.*", "algorithms", "qlora", "pretrained", "loftq", "export", "export.*", "adapters", "optimizers"),
    *(
        "captured",
        "regions",
        "compiling",
        "serialization",
        "report",
        "explain",
        "unpacking",
        "merging",
        "mixed",
        "allocate",
        "plots",
        "selection",
    ),
    *("distillation", "distributions", "samples", "watching", "chance", "coverage"),
    *("passes", "work", "sequential", "preflight", "pipeline"),
    *("loop", "quantize", "probes", "sensitivity", "compare", "calibration_report", "checkpoint"),
    *("teacher", "pairing"),
    *("companions", "precision", "text", "callbacks.packed_base", "callbacks.schedule", "callbacks.preparation"),
    *("callbacks.*", "callbacks", "trainer"),
    *("cli", "__main__", ""),
]
MAY_IMPORT_LIGHTNING = [
    *("loop", "quantize", "probes", "sensitivity", "compare", "calibration_report", "checkpoint"),
    *("teacher", "companions", "callbacks", "callbacks.*", "precision", "text", "trainer", "cli", ""),
]
# imported only by who has what they need
WHEN_USED = [
    *("nn.transformers_conv1d", "kernels.native.fake", "kernels.cpu_fake_quant"),
    *(f"kernels.triton.{name}" for name in ("device", "quantize", "fake_quant", "weights", "int8")),
]
OPTIONAL = {"transformers", "peft", "bitsandbytes", "wandb", "compressed_tensors", "matplotlib", "triton"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def level(name: str) -> int:
    for index, pattern in enumerate(ORDER):
        if name == pattern or ("*" in pattern and fnmatchcase(name, pattern)):
            return index
    raise AssertionError(f"{name} has no place in the order of layers: add it to ORDER in {__file__}")


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """Full names of what a module imports, and whether that runs at import time."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}: relative import in line {child.lineno}"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    is_module = full.removeprefix(f"{PACKAGE}.") in FILES
                    yield (full if is_module else str(child.module)), top
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                yield from walk(child, False)
            else:
                yield from walk(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    yield from walk(ast.parse(FILES[name].read_text()), True)


def test_the_package_is_found():
    assert {"spec", "nn.base", "kernels", ""} <= set(FILES)


@pytest.mark.parametrize("name", FILES, ids=lambda name: name or PACKAGE)
def test_imports_go_down(name):
    mine = level(name)
    for imported, top in imports(name):
        if imported == PACKAGE or imported.startswith(f"{PACKAGE}."):
            other = imported.removeprefix(PACKAGE).removeprefix(".")
            assert level(other) < mine, f"{name or PACKAGE} imports {imported}, which is not below it"
            assert not (top and other in WHEN_USED and name not in WHEN_USED), f"{name} imports {imported} at its top level"


@pytest.mark.parametrize("name", FILES, ids=lambda name: name or PACKAGE)
def test_who_imports_what_is_not_ours(name):
    allowed = any(fnmatchcase(name, pattern) for pattern in MAY_IMPORT_LIGHTNING)
    for imported, top in imports(name):
        package = imported.partition(".")[0]
        assert allowed or package not in ("lightning", "pytorch_lightning"), f"{name} imports {imported}"
        if name not in WHEN_USED:
            assert not (top and package in OPTIONAL), f"{name} imports the optional {imported} at its top level"


def test_import_prints_nothing_and_starts_no_gpu():
    code = f"import {PACKAGE}, torch; raise SystemExit(3 if torch.cuda.is_initialized() else 0)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
