"""Activations that are kept between passes: in memory up to a budget, in files beyond it."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(value: int | str | None, what: str = "memory_budget") -> int | None:
    """A number of bytes, given as such or with a unit; None stays None.

    Raises:
        ValueError: neither; the message names `what`.

    Example:
        >>> parse_bytes("1.5 GB"), parse_bytes("2MiB"), parse_bytes(10)
        (1500000000, 2097152, 10)
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower()) if isinstance(value, str) else None
    if found is None or (found[2] or "b") not in _UNITS:
        raise ValueError(f'{what}={value!r}: give bytes, as a number or as text such as "500 MB" or "2 GiB"')
    return int(float(found[1]) * _UNITS[found[2] or "b"])


def format_bytes(value: float) -> str:
    """Bytes for people.

    Example:
        >>> format_bytes(532), format_bytes(1_530_000)
        ('532 B', '1.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def available_memory() -> int | None:
    """Bytes that can be had without swapping, or None where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    return None


def checksum(tensor: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's shape, dtype and values."""
    start = zlib.crc32(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), start)
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(data.data, start)


class Budget:
    """How many bytes of activations may stay in memory; it is shared by all that is made with it.

    A context: at its end the files are gone.

    Args:
        limit: in bytes; None: a quarter of what is available now.
        folder: in which a folder for files is made when the first one is needed; None: the system's for temporary files.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        if limit is None:
            available = available_memory()
            limit = 2**62 if available is None else available // 4
        self.limit, self.used, self.largest = limit, 0, 0
        self._parent, self._folder, self._files = folder, None, 0  # type: Path | None, Path | None, int

    def __enter__(self) -> Budget:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def take(self, size: int) -> bool:
        """Use that many bytes, if they are left."""
        if self.used + size > self.limit:
            return False
        self.used += size
        self.largest = max(self.largest, self.used)
        return True

    def new_file(self) -> Path:
        """A path that no other file has."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="activations-", dir=self._parent))
        self._files += 1
        return self._folder / f"{self._files}.pt"

    def close(self) -> None:
        """Delete all files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class Activations:
    """A list of tensors, one a batch, that spills to files when its budget is used up.

    Example:
        >>> with Budget(limit=100) as budget:
        ...     kept = Activations(budget)
        ...     for value in torch.arange(40.0).split(20):
        ...         kept.append(value)
        ...     kept.spilled, kept[1].sum().item()
        (1, 590.0)
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._values: list[Tensor | Path] = []

    def __len__(self) -> int:
        return len(self._values)

    @property
    def spilled(self) -> int:
        """How many lie in files."""
        return sum(isinstance(value, Path) for value in self._values)

    def append(self, value: Tensor) -> None:
        self._values.append(self._keep(value))

    def __getitem__(self, index: int) -> Tensor:
        value = self._values[index]
        return torch.load(value, weights_only=True) if isinstance(value, Path) else value

    def __setitem__(self, index: int, value: Tensor) -> None:
        self._release(self._values[index])
        self._values[index] = self._keep(value)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def clear(self) -> None:
        for value in self._values:
            self._release(value)
        self._values.clear()

    def _keep(self, value: Tensor) -> Tensor | Path:
        value = value.detach()
        if value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()  # a view would keep the whole; strides stay, which decide how sums are rounded
        if self.budget.take(value.nbytes):
            return value
        path = self.budget.new_file()
        torch.save(value, path)
        return path

    def _release(self, value: Tensor | Path) -> None:
        if isinstance(value, Path):
            value.unlink(missing_ok=True)
        else:
            self.budget.used -= value.nbytes


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor in a `Pool`."""

    index: int


class Pool:
    """Tensors that many calls have in common, as masks are, each kept once.

    Example:
        >>> pool = Pool(Budget())
        >>> pool.put(torch.ones(3)) == pool.put(torch.ones(3)), pool.put(torch.zeros(3))
        (True, Ref(index=1))
    """

    def __init__(self, budget: Budget) -> None:
        self._kept = Activations(budget)
        self._found: dict[int, list[int]] = {}

    def put(self, value: Tensor) -> Ref:
        alike = self._found.setdefault(checksum(value), [])
        for index in alike:
            if same_value(self._kept[index], value):
                return Ref(index)
        alike.append(len(self._kept))
        self._kept.append(value.detach().clone())
        return Ref(alike[-1])

    def get(self, leaf: Any) -> Any:
        """The tensor of a `Ref`; anything else as it is."""
        return self._kept[leaf.index] if isinstance(leaf, Ref) else leaf

    def clear(self) -> None:
        self._kept.clear()
        self._found.clear()


class Calls:
    """How one module is called in each batch: one tensor of its arguments that changes, and the rest.

    Args:
        hidden: the tensor that a previous module made, one a batch.
        rest: all arguments flattened, one list a batch, tensors as `Ref`; what stands at `slots` is left out.
        specs: how to put them together again, one a batch.
        slots: the places of the tensor among the flattened arguments.
        pool: holds the tensors of `rest`.
        autocast: device type and dtype of the autocast that the calls were made under, if any.
    """

    def __init__(
        self,
        hidden: Activations,
        rest: list[list[Any]],
        specs: list[TreeSpec],
        slots: tuple[int, ...],
        pool: Pool,
        autocast: tuple[str, torch.dtype] | None = None,
    ) -> None:
        self.hidden, self.rest, self.specs, self.slots, self.pool, self.autocast = hidden, rest, specs, slots, pool, autocast

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.with_hidden(index, self.hidden[index])

    def with_hidden(self, index: int, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a batch with a copy of another tensor in its place: blocks may write into it."""
        leaves = [self.pool.get(leaf) for leaf in self.rest[index]]
        copied = hidden.clone()
        for slot in self.slots:
            leaves[slot] = copied
        args, kwargs = tree_unflatten(leaves, self.specs[index])
        return args, kwargs

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What calls are made under."""
        return contextlib.nullcontext() if self.autocast is None else torch.autocast(*self.autocast)


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
    """The leaves of a call's arguments. Key-value caches become None: they would grow with every replay."""

    def plain(value: Any) -> Any:
        return None if any(cls.__name__ == "Cache" for cls in type(value).__mro__) else value

    leaves, spec = tree_flatten((tuple(map(plain, args)), {key: plain(value) for key, value in kwargs.items()}))
    return [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec


def same_value(one: Any, two: Any) -> bool:
    """Whether two arguments are equal, tensors element by element."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one is two or (one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two))
    try:
        return one is two or bool(one == two)
    except (TypeError, ValueError, RuntimeError):
        return False
