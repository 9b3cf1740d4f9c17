"""Quantized weights that are used several times before they change, as gradient accumulation and shared layers do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Kept:
    """A quantized weight, kept while neither it nor what it is quantized with changes.

    Only what was used more than once before the last change is kept, since keeping it costs the memory of the weight. A change is
    seen by the version of a tensor; what is changed otherwise (`.data`) has to be followed by `drop`.
    """

    def __init__(self) -> None:
        self.made: tuple[Any, ...] | None = None
        self._state: tuple[Any, ...] = ()
        self._uses = 0
        self._often = False

    def drop(self) -> None:
        """Forget what is kept, as before a change."""
        if self._uses:
            self._often = self._uses > 1
        self.made, self._state, self._uses = None, (), 0

    @contextlib.contextmanager
    def used(self, *made_from: Any) -> Iterator[None]:
        """While it lasts, what is quantized is this weight.

        Args:
            made_from: tensors that the result depends on, and whatever else can be compared.
        """
        state = tuple((id(x), x.data_ptr(), x._version) if isinstance(x, Tensor) else x for x in made_from)
        if state != self._state:
            self.drop()
            self._state = state
        if torch._C._current_graph_task_id() == -1:  # a checkpointed block runs again in the backward pass
            self._uses += 1
        if not self._often and self._uses < 2:
            yield
            return
        before, _now.kept = _now.kept, self
        try:
            yield
        finally:
            _now.kept = before

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # nobody would drop what a copy keeps


class _Now(threading.local):
    """Whose weight a thread is quantizing."""

    kept: Kept | None = None


_now = _Now()


def once(make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """What a kernel makes, its quantized tensor first; of a weight that is kept, what it has made before."""
    kept = _now.kept
    if kept is None:
        return make()
    if kept.made is None:
        kept.made = make()
    return kept.made[0].detach(), *kept.made[1:]


def is_kept() -> bool:
    """Whether what is quantized now is a weight that is kept."""
    return _now.kept is not None


def made_now() -> Tensor | None:
    """The tensor that is kept of the weight that is being quantized, if any."""
    kept = _now.kept
    return None if kept is None or kept.made is None else kept.made[0]
