"""Passes of calibration data through a model, and whether they are of the same data."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_quant.activations import checksum
from lightning_quant.calibration import Enough, all_reduce, has_ranks


class Passes:
    """Runs the calibration data, and refuses a pass of other data than the first.

    Args:
        model: the inputs of the part of it that is called first tell data apart.
        run: passes all calibration data through `model`; a batch ends at `Enough`.
        example: passes one batch through it.
    """

    def __init__(self, model: nn.Module, run: Callable[[], None], example: Callable[[], Any]) -> None:
        self.model, self.run = model, run
        self.entrance = _entrance(model, example)
        self.batches = self._seen(stop=True)

    def __call__(self) -> None:
        """One pass.

        Raises:
            ValueError: the data differ from those of the first pass.
        """
        seen = iter(self._seen(stop=False))
        if not all(batch in seen for batch in self.batches):  # in order; a batch may call the entrance more than once
            raise ValueError(
                "the calibration data differ from pass to pass, and what runs compares passes: turn off random augmentation, seed "
                "the generator of what shuffles, or give batches as a list"
            )

    def fingerprint(self) -> tuple[int, int]:
        """Number of batches and checksum of the data, over all ranks."""
        device = next(self.model.parameters()).device
        total = torch.tensor([len(self.batches), zlib.crc32(str(self.batches).encode())], dtype=torch.int64, device=device)
        if has_ranks():
            all_reduce(total, "sum")
        count, data = total.tolist()
        return count, data

    def _seen(self, stop: bool) -> list[int]:
        """The checksums of what the entrance is called with.

        Args:
            stop: end a batch there.
        """
        seen: list[int] = []

        def see(_: nn.Module, args: Any, kwargs: Any) -> None:
            total = 0
            for leaf in tree_leaves((args, kwargs)):
                total = checksum(leaf, total) if isinstance(leaf, Tensor) else total
            seen.append(total)
            if stop:
                raise Enough

        handle = self.model.get_submodule(self.entrance).register_forward_pre_hook(see, prepend=True, with_kwargs=True)
        try:
            self.run()
        finally:
            handle.remove()
        return seen


def _entrance(model: nn.Module, example: Callable[[], Any]) -> str:
    """The name of the module that is called first."""
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():
        see = lambda _, args, name=name: found.append(name)  # noqa: E731
        handles.append(module.register_forward_pre_hook(see))
    try:
        example()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""
