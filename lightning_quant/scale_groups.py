"""Learned scales in optimizer groups of their own, split off after the user's `configure_optimizers`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_quant.surgery import learned_parameters

# lists that schedulers keep with one entry a group, besides those of rates
_OTHER_LISTS = ("base_momentums", "max_momentums")


def _is_rate(name: str) -> bool:
    return name == "lr" or name.endswith("_lr")


class ScaleGroups:
    """Splits the learned scales and zero points of a model from the groups that they are in.

    Their rate is `factor` times their former group's, now and under any torch scheduler, and they have no weight decay.

    Args:
        module: a prepared module.
        optimizers: as `configure_optimizers` made them, without state yet.
        schedulers: theirs.
        factor: of the rate.

    Raises:
        ValueError: no learned scale is in any of the optimizers, or one of them, or a scheduler, cannot be split.

    Example:
        >>> import torch
        >>> from lightning_quant.surgery import prepare
        >>> net = prepare(nn.Sequential(nn.Linear(8, 4)), "w8a8", method="lsq")
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=1e-4)
        >>> groups = ScaleGroups(net, [optimizer], [], 0.1)
        >>> [(len(group["params"]), round(group["lr"], 4), group["weight_decay"]) for group in optimizer.param_groups]
        [(2, 0.1, 0.0001), (3, 0.01, 0.0)]
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer], schedulers: Iterable[Any], factor: float) -> None:
        self.factor = factor
        learned = learned_parameters(module)
        # (optimizer, its groups before, what each new group was split from, groups that held nothing else)
        self.splits = [(each, len(each.param_groups), *self._split(each, learned)) for each in optimizers]
        if not any(parents or own for _, _, parents, own in self.splits):
            raise ValueError(
                "scale_lr: no learned scale is in any optimizer: give configure_optimizers all of self.parameters(), or omit it"
            )
        self.schedulers = list(schedulers)
        for scheduler in self.schedulers:
            self._widen(scheduler, fresh=True)

    def _split(self, optimizer: Optimizer, learned: set[int]) -> tuple[list[int], list[int]]:
        parents, own = [], []
        for index, group in enumerate(list(optimizer.param_groups)):
            held = [id(value) in learned for value in group["params"]]
            if not any(held):
                continue
            if isinstance(optimizer, LBFGS):
                raise ValueError("scale_lr: LBFGS has one group for all parameters; leave scale_lr out, or use another optimizer")
            if all(held):
                own.append(index)
                group.update({key: value * self.factor for key, value in group.items() if _is_rate(key)}, weight_decay=0.0)
                continue
            parents.append(index)
            lists = [key for key in ("params", "param_names") if key in group]
            new = {key: value * self.factor if _is_rate(key) else value for key, value in group.items() if key not in lists}
            new |= {key: [value for value, mine in zip(group[key], held, strict=True) if mine] for key in lists}
            for key in lists:
                group[key] = [value for value, mine in zip(group[key], held, strict=True) if not mine]
            optimizer.add_param_group({**new, "weight_decay": 0.0})
        return parents, own

    def _widen(self, scheduler: Any, fresh: bool) -> None:
        """Give a scheduler entries for the new groups; `fresh`: also bring the rates of the groups that held nothing else down."""
        if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
            raise ValueError(
                f"scale_lr: {type(scheduler).__name__} is no torch scheduler, and may not see the groups that are split off: use "
                f"lq.param_groups(self, lr=..., scale_lr=...) in configure_optimizers instead"
            )
        for part in getattr(scheduler, "_schedulers", ()):
            self._widen(part, fresh)
        optimizer = getattr(scheduler, "optimizer", None)
        before, parents, own = next((split[1:] for split in self.splits if split[0] is optimizer), (0, [], []))
        for name, values in vars(scheduler).items():
            rates = name in ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
            if not isinstance(values, list) or len(values) != before or not (rates or name in ("lr_lambdas", *_OTHER_LISTS)):
                continue
            if rates and fresh:
                for index in own:
                    values[index] = values[index] * self.factor
            values.extend(values[parent] * self.factor if rates else values[parent] for parent in parents)

    def restore(self) -> None:
        """After the state of a run without learned scales was loaded: the new groups follow the ones that they were split from."""
        for scheduler in self.schedulers:
            self._widen(scheduler, fresh=False)
        for optimizer, before, parents, _ in self.splits:
            for group, parent in zip(optimizer.param_groups[before:], parents, strict=True):
                source = optimizer.param_groups[parent]
                group.update({key: value * self.factor for key, value in source.items() if _is_rate(key)})
