"""Compiling kernels ahead of time for devices that are not there, and reading what came of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# compute capability -> shared memory that a block may have, bytes (CUDA C++ Programming Guide, table of technical specifications)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """Registers of a thread, bytes of shared memory, instructions that spill or reload registers, and the matrix instructions."""

    registers: int
    shared: int
    spills: int
    products: frozenset[str]


def compile_for(kernel: Any, arguments: dict[str, Any], options: dict[str, Any], capability: int) -> Compiled:
    """Compile for a compute capability.

    Args:
        arguments: by the kernel's parameters: a type, such as `"*fp16"`, `"i32"` or `"i32:16"` (16 divides it),
            or a compile-time value.
        options: num_warps and so on.
    """
    names = kernel.arg_names
    assert set(arguments) == set(names), set(arguments) ^ set(names)
    constants = {name: value for name, value in arguments.items() if not _is_type(value)}
    signature = {name: "constexpr" if name in constants else arguments[name].removesuffix(":16") for name in names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if _is_aligned(arguments[name])}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", file.name)
        assembly = _run("nvdisasm", file.name)
    registers = int(re.search(r"\bREG:(\d+)", usage)[1])
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", assembly, re.MULTILINE)
    assert len(instructions) > 20
    spills = sum(name in ("STL", "LDL") for name in instructions)
    return Compiled(registers, compiled.metadata.shared, spills, frozenset(name for name in instructions if "MMA" in name))


def _is_type(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"\*?(fp|bf|i)\d+(:16)?", value))


def _is_aligned(value: Any) -> bool:
    return _is_type(value) and (value.startswith("*") or value.endswith(":16"))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
