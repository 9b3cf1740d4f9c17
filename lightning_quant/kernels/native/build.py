"""Compile the library: `python build.py OUT`, with the C compiler of `$CC` or the first of cc, gcc and clang."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# OpenMP is compiled in and not linked: its symbols resolve to the library that torch has loaded, so there is one pool of threads
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-DLQ_TABLE=lq_avx2")
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vnni", "-mavx512bf16", "-mfma", "-mf16c"),
    *("-mprefer-vector-width=512", "-DLQ_TABLE=lq_avx512"),
)


class BuildError(RuntimeError):
    """There is no C compiler, or it failed."""


def compiler() -> list[str]:
    """The C compiler's command.

    Raises:
        BuildError: none is found.
    """
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C compiler found (cc, gcc or clang; $CC names another)")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr.strip()}")


def _knows(cc: list[str], flags: tuple[str, ...]) -> bool:
    """Whether the compiler has these instruction sets."""
    return subprocess.run([*cc, *flags, "-x", "c", "-E", os.devnull], capture_output=True).returncode == 0


def build(out: str | Path, extra: tuple[str, ...] = ()) -> Path:
    """Compile the library to `out`, under a temporary name first.

    Args:
        extra: further flags for compiling and linking, such as a sanitizer's.

    Raises:
        BuildError: no compiler, or it failed; its messages are the error's.
    """
    out, cc = Path(out), compiler()
    units: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in ("generic.c", "images.c", "fake_quant.c")]
    defines: tuple[str, ...] = ()
    if platform.machine().lower() in ("x86_64", "amd64"):
        units += [(name, _AVX2) for name in ("generic.c", "images.c", "fake_quant.c")]
        units += [(name, _AVX512) for name in ("avx512.c", "images.c", "fake_quant.c")]
    else:
        defines = ("-DLQ_BASE_ONLY",)
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for number, (source, flags) in enumerate(units):
            target = f"{folder}/{number}.o"
            if flags is _AVX512 and not _knows(cc, flags):
                defines = ("-DLQ_NO_AVX512",)
                continue
            _run([*cc, *FLAGS, *flags, *extra, "-c", str(HERE / source), "-o", target])
            objects.append(target)
        _run([*cc, *FLAGS, *defines, *extra, "-c", str(HERE / "library.c"), "-o", f"{folder}/library.o"])
        made = out.with_name(f"{out.name}.{os.getpid()}")
        try:
            _run([*cc, "-shared", *extra, "-o", str(made), *objects, f"{folder}/library.o"])
            made.replace(out)
        finally:
            made.unlink(missing_ok=True)
    return out


if __name__ == "__main__":
    build(sys.argv[1])
