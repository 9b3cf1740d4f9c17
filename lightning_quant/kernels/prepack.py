"""Weights in the layout that a kernel wants, made once, kept outside of modules and their state_dicts.

A kernel asks with the packed tensors at every call. What it gets is found by the tensors themselves, as long as they are what they
were (same object, same memory, same version), else by their content: a copied module, or two with the same weights, share one. It
is freed with the last tensor that it was made of.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# what tells that a tensor is as it was: its address and version, or, for an inference tensor, a copy
Stamp = Any
_Found = tuple[tuple["weakref.ref[Tensor]", ...], tuple[Stamp, ...], Any]

_lock = threading.RLock()
# id of the first tensor -> (a reference whose callback removes the row, what was made of it by key)
_by_tensor: dict[int, tuple[weakref.ref[Tensor], dict[Hashable, _Found]]] = {}
_by_content: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()


def _stamp(tensor: Tensor) -> Stamp:
    # inference tensors count no versions: what they hold has to be compared
    return tensor.clone() if tensor.is_inference() else (tensor.data_ptr(), tensor._version)


def _unchanged(tensor: Tensor, stamp: Stamp) -> bool:
    if tensor.is_inference():
        return isinstance(stamp, Tensor) and stamp.device == tensor.device and torch.equal(stamp, tensor)
    return stamp == (tensor.data_ptr(), tensor._version) if isinstance(stamp, tuple) else False


def _digest(tensors: tuple[Tensor, ...], key: Hashable) -> Hashable:
    found = hashlib.blake2b(digest_size=20)
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        # a copy: a storage that numpy has seen cannot be resized any more, which FSDP does
        found.update(tensor.detach().cpu().reshape(-1).clone().view(torch.uint8).numpy().data)
    return found.digest(), tensors[0].device, key


def prepacked(build: Callable[[], T], key: Hashable, *tensors: Tensor) -> T:
    """What `build` makes of some tensors, made anew only if they changed.

    Args:
        build: returns an object that can be referenced weakly (an instance of a class, not a tuple), and that holds none of
            `tensors`. It runs outside of inference mode, so that its tensors can be used in any.
        key: what else the result depends on.
        tensors: the packed weight, and what belongs to it. Changes are seen by their address and version: not those that bypass
            both (`tensor.data.copy_(...)`); `forget` tells of them.

    Example:
        >>> class Doubled:
        ...     def __init__(self, values):
        ...         self.values = values * 2
        >>> words = torch.ones(3)
        >>> first = prepacked(lambda: Doubled(words), "doubled", words)
        >>> prepacked(lambda: Doubled(words), "doubled", words) is first
        True
        >>> _ = words.add_(1)
        >>> prepacked(lambda: Doubled(words), "doubled", words).values
        tensor([4., 4., 4.])
    """
    first = tensors[0]
    row = _by_tensor.get(id(first))
    found = row[1].get(key) if row is not None and row[0]() is first else None
    if found is not None:
        refs, stamps, value = found
        if all(ref() is tensor and _unchanged(tensor, stamp) for ref, tensor, stamp in zip(refs, tensors, stamps, strict=True)):
            return value
    with _lock, torch.inference_mode(False), torch.no_grad():
        content = _digest(tensors, key)
        value = _by_content.get(content)
        if value is None:
            value = build()
            _by_content[content] = value
        row = _by_tensor.get(id(first))
        if row is None or row[0]() is not first:
            number = id(first)
            row = (weakref.ref(first, lambda ref: _remove(number, ref)), {})
            _by_tensor[number] = row
        row[1][key] = (tuple(map(weakref.ref, tensors)), tuple(map(_stamp, tensors)), value)
    return value


def _remove(number: int, ref: weakref.ref[Tensor]) -> None:
    row = _by_tensor.get(number)
    if row is not None and row[0] is ref:  # a new tensor may have the number of one that is gone
        del _by_tensor[number]


def forget(*tensors: Tensor | None) -> None:
    """Drop what was made of these tensors: they are moved, or changed in a way that their version does not tell."""
    for tensor in tensors:
        _by_tensor.pop(id(tensor), None)


def count() -> int:
    """How many prepacked weights are alive."""
    return len(_by_content)
