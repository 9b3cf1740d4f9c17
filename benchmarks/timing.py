"""What the speed benchmarks share: settled blocks of calls that take turns, ratios, the machine, JSON and plots.

A method is measured in blocks: it is called until it has settled (threads awake, caches and prefetchers its own), then its calls
are timed for a while. All methods' blocks take turns in each round, in reversed order in every other round, so that a machine's
drift meets all of them alike; a ratio is that of blocks of one round, and what is reported are medians over the rounds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quant.kernels import native

# a call; if it returns a float, it has timed itself: that many seconds
Call = Callable[[], Any]
Times = dict[str, list[float]]
PACKAGES = ("torch", "bitsandbytes", "torchao", "openvino", "nncf", "onnx", "onnxruntime", "transformers")


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Args:
        rounds: blocks of each method.
        block: seconds of calls that are timed in a block, at least one call.
        settle: seconds of calls before them, at least one call; 0: none.
        pause: seconds of sleep before a block, in which the threads of the last method's runtime stop spinning.
    """

    rounds: int = 7
    block: float = 0.2
    settle: float = 0.1
    pause: float = 0.0


def _calls(call: Call, seconds: float) -> float:
    """Mean seconds of a call, over so many seconds and at least one call."""
    total, count, begin = 0.0, 0, time.perf_counter()
    while not count or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        own = call()
        total += own if isinstance(own, float) else time.perf_counter() - start
        count += 1
    return total / count


@torch.inference_mode()
def measure(calls: Mapping[str, Call], settings: Settings) -> Times:
    """Seconds of a call by method, one value a round."""
    times: Times = {name: [] for name in calls}
    for turn in range(settings.rounds):
        for name in list(calls)[:: 1 - 2 * (turn % 2)]:
            time.sleep(settings.pause)
            if settings.settle:
                _calls(calls[name], settings.settle)
            times[name].append(_calls(calls[name], settings.block))
    return times


def ratios(times: Times, base: str) -> dict[str, float]:
    """How many times as fast as `base` each method is: the median of the rounds' ratios.

    Example:
        >>> ratios({"fp32": [2.0, 4.0, 3.0], "int8": [1.0, 1.0, 1.0]}, "fp32")
        {'fp32': 1.0, 'int8': 3.0}
    """
    pairs = {name: zip(times[base], values, strict=True) for name, values in times.items()}
    return {name: statistics.median(by / own for by, own in pair) for name, pair in pairs.items()}


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def error(out: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, relative to that of `exact`.

    Example:
        >>> error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        0.0
    """
    return float((out.float() - exact).norm() / exact.norm())


def cosine(out: Tensor, exact: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(out.double().flatten(), exact.double().flatten(), dim=0))


def read_bandwidth(threads: int, size: int = 1 << 28, repeats: int = 5) -> tuple[float, str]:
    """Bytes a second that the threads read from memory, and how: the fastest of torch's reductions over `size` bytes."""
    torch.set_num_threads(threads)
    buffer, row = torch.zeros(size // 4), torch.zeros(1 << 14)
    whole = buffer.view(torch.int64)
    ways: dict[str, Call] = {
        "torch.sum of int64": whole.sum,
        "torch.sum of float32": buffer.sum,
        "torch.amax of float32": buffer.amax,
        "torch.dot of the two halves": lambda: torch.dot(*buffer.chunk(2)),
        "torch.mv of float32": lambda: torch.mv(buffer.view(-1, 1 << 14), row),
    }
    times = measure(ways, Settings(repeats, 0.05, 0.05))
    name = min(times, key=lambda way: min(times[way]))
    return size / min(times[name]), name


def cache_bytes() -> int:
    """Of the last level of cache; 32 MiB if the system does not tell."""
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(found, default=32 << 20)


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
        name = next((value.strip() for key, value in lines if key.strip() == "model name"), name)
    versions = {}
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": threads,
        "kernels": native.isa() if native.library() is not None else "not built: the reference runs instead",
        "torch": torch.backends.cpu.get_cpu_capability(),
        "cache": cache_bytes(),
        "versions": versions,
    }


def describe(found: Mapping[str, Any]) -> str:
    """`machine()` in lines, with what it lacks."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, last-level cache {found['cache'] >> 20} MiB",
        f"lightning_quant's CPU kernels: {found['kernels']}; torch's: {found['torch']}",
        versions,
    ]
    lacking = [word for word in ("avx512", "bf16", "amx") if word not in found["kernels"]]
    lacking += [package for package in PACKAGES if package not in found["versions"]]
    return "\n".join([*lines, f"lacking: {', '.join(lacking) or 'nothing'}"])


class Built(dict[str, Any]):
    """Methods by name, and the reasons why others are not there.

    Example:
        >>> built = Built()
        >>> built.add("peer", lambda: importlib.import_module("no_such_package"))
        peer: skipped, ModuleNotFoundError: No module named 'no_such_package'
        >>> dict(built), built.skipped
        ({}, {'peer': "ModuleNotFoundError: No module named 'no_such_package'"})
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[str, str] = {}

    def add(self, name: str, make: Callable[[], Any], ours: bool = False) -> None:
        """Keep what `make` returns; if it raises, say so and go on. What is this package's own raises on, except imports."""
        try:
            self[name] = make()
        except Exception as problem:
            if ours and not isinstance(problem, ImportError):
                raise
            self.skip(name, f"{type(problem).__name__}: {problem}")

    def skip(self, name: str, reason: str) -> None:
        self.pop(name, None)
        self.skipped[name] = next(iter(reason.strip().splitlines()), "")[:200]
        print(f"{name}: skipped, {self.skipped[name]}", flush=True)


def arguments(description: str | None, settings: Settings) -> argparse.ArgumentParser:
    """A parser with the options that all speed benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--rounds", type=int, default=settings.rounds, help="blocks of each method (default %(default)s)")
    parser.add_argument("--block", type=float, default=settings.block, help="timed seconds in a block (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few rounds of short blocks: to see that all runs, not how fast")
    parser.add_argument("--json", type=Path, help="a file to write every time measured to")
    parser.add_argument("--plot", type=Path, help="a picture to write; needs matplotlib")
    return parser


def settings_of(args: argparse.Namespace, settings: Settings) -> Settings:
    """The parser's options over the defaults."""
    if args.quick:
        return Settings(2, min(args.block, 0.02), 0.0, settings.pause / 4)
    return Settings(args.rounds, args.block, settings.settle, settings.pause)


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path}")


def figure(path: Path | None, draw: Callable[[Any], None], size: Sequence[float] = (9.0, 6.0)) -> None:
    """Save what `draw` draws on a matplotlib figure."""
    if path is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path}: not written, matplotlib is not installed (pip install 'lightning-quant[plots]')")
        return
    shown = Figure(figsize=tuple(size), layout="constrained")
    draw(shown)
    shown.savefig(path, dpi=150)
    print(f"written: {path}")
