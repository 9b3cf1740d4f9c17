"""Memory that is used again: allocators give large blocks back to the system, which has to clear each page of them anew.

Fake quantization makes tensors that live for one layer only, in the forward and again in the backward pass. Allocated each time,
they cost as much in the system as in the kernels.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

# bytes: smaller blocks are not given back, larger ones too much to hold on to
SMALLEST, LARGEST = 1 << 17, 1 << 26
# of a thread: a layer's input and weight, in two sizes
COUNT = 4
# a block is used for what takes at least this part of it
FULL = 0.5

_uses: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


class _Block:
    """Bytes, and whether somebody else has them: a storage counts what refers to it, and so does its object in Python."""

    def __init__(self, size: int) -> None:
        self.size, self.storage = size, torch.empty(size, dtype=torch.uint8).untyped_storage()
        self._alone = self._references()

    def _references(self) -> tuple[int, int]:
        return _uses(self.storage._cdata) if _uses else 0, sys.getrefcount(self.storage)

    @property
    def is_free(self) -> bool:
        return self._references() == self._alone


class _Blocks(threading.local):
    """Blocks of a thread; who asks first gets the smallest free one that fits."""

    def __init__(self) -> None:
        self.blocks: list[_Block] = []

    def take(self, size: int) -> _Block:
        """A block of at least so many bytes that nobody else has."""
        fitting = [block for block in self.blocks if size <= block.size <= size / FULL and block.is_free]
        if fitting:
            return min(fitting, key=lambda block: block.size)
        if len(self.blocks) == COUNT:
            # what somebody holds on to does not come back soon; else the one that was made first
            self.blocks.remove(next((block for block in self.blocks if not block.is_free), self.blocks[0]))
        self.blocks.append(_Block(size))
        return self.blocks[-1]


_blocks = _Blocks()


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like` of a CPU tensor without gaps, in memory that an earlier result had, if nothing refers to that any more.

    Example:
        >>> x = torch.zeros(1 << 16)
        >>> first = empty_like(x)
        >>> address = first.data_ptr()
        >>> empty_like(x).data_ptr() == address
        False
        >>> del first
        >>> empty_like(x).data_ptr() == address
        True
    """
    size = x.numel() * x.element_size()
    if _uses is None or not SMALLEST <= size <= LARGEST:
        return torch.empty_like(x)
    return torch.empty(0, dtype=x.dtype).set_(_blocks.take(size).storage, 0, x.shape, x.stride())


def clear() -> None:
    """Give back what this thread has."""
    _blocks.blocks.clear()
