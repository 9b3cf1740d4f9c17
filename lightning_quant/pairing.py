"""The outputs of a model in training and of its teacher, in pairs, without a word in the training step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_quant.distillation import Pair
from lightning_quant.teacher import Teacher

# --- modules and their outputs ----------------------------------------------------------------------------------------


def main_tensor(output: Any) -> Tensor | None:
    """The tensor that an output is, or its `logits`; None: neither, or a single number."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    return found if isinstance(found, Tensor) and found.is_floating_point() and found.dim() > 0 else None


def first_tensor(output: Any) -> Tensor | None:
    """The first float tensor of a layer's output."""
    if isinstance(output, PackedSequence):
        return output.data
    leaves = output.values() if isinstance(output, Mapping) else tree_leaves(output)
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)


def callable_parts(student: nn.Module) -> dict[str, nn.Module]:
    """What a training step may call: the model, its direct parts, and those of lists, but for metrics and what has no weights."""
    found, left = {"": student}, list(student.named_children())
    while left:
        name, part = left.pop(0)
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
            left += [(f"{name}.{key}", child) for key, child in part.named_children()]
        elif not isinstance(part, Metric) and next(part.parameters(), None) is not None:
            found[name] = part
    return found


def shifts_labels(module: nn.Module) -> bool:
    """Whether this holds a causal language model of transformers, whose outputs predict the next token."""
    return any(type(part).__name__.endswith(("ForCausalLM", "LMHeadModel")) for part in module.modules())


def _ignore(*args: Any, **kwargs: Any) -> None:
    """What a copied hook does."""


class _Hook:
    """A hook of this module alone: copies and pickles of the module do nothing."""

    def __init__(self, call: Callable[..., None]) -> None:
        # compiled code breaks here, and goes on calling the hook
        self.call = torch.compiler.disable(call) if "torch._dynamo" in sys.modules else call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.call(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _Hook, (_ignore,)


# --- calls ----------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """One call of the student's from its training step, and the teacher's in its place."""

    name: str
    keywords: dict[str, Any]
    taught: Any = None
    reason: str = ""  # why the teacher could not follow
    output: Any = None
    used: bool = False  # by a later call


@dataclass
class Recorder:
    """Watches a student: each call from outside of it is also the teacher's, just before, and outputs are kept in pairs.

    Args:
        student: the LightningModule.
        teacher: see `Teacher`.
        output: names of the modules whose outputs are compared; none: what the last calls from outside return.
        layers: names of layers of the student -> of the teacher.
        redirected: whether the outermost call of the student is Lightning's own, which runs the training step in it (as under DDP).

    Example:
        >>> from lightning_quant.teacher import as_teacher
        >>> net = nn.Linear(2, 2)
        >>> recorder = Recorder(net, as_teacher(net, net, None))
        >>> recorder.start()
        >>> y = net(torch.ones(1, 2))
        >>> pairs, _ = recorder.take(outputs=True)
        >>> recorder.close()
        >>> torch.equal(pairs[0].student, pairs[0].teacher), len(net._forward_hooks)
        (True, 0)
    """

    student: nn.Module
    teacher: Teacher
    output: Sequence[str] = ()
    layers: Mapping[str, str] = field(default_factory=dict)
    redirected: bool = False
    open: bool = False

    def __post_init__(self) -> None:
        self.shifted = shifts_labels(self.student)
        self._handles: list[RemovableHandle] = []
        self.start()
        self.open = False
        entries = {**callable_parts(self.student), **{name: self.student.get_submodule(name) for name in self.output}}
        taps = [*self.output, *self.layers]
        for name in taps:
            self._tap(self.student.get_submodule(name), self._seen, name, student=True)
            theirs = self.layers.get(name) or self.teacher.find(name)
            if theirs is not None:
                self._tap(self.teacher.module.get_submodule(theirs), self._taught, name, student=False)
        for name, part in entries.items():
            before, after = self._hooks(name)
            self._handles.append(part.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            self._handles.append(part.register_forward_hook(after, with_kwargs=True))

    def close(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.start()
        self.open = False

    def start(self) -> None:
        """Forget what was seen, and watch."""
        self.open, self._inside = True, False
        self._stack: list[str] = []
        self._calls: list[_Call] = []
        self._pairs: dict[str, list[Pair]] = {name: [] for name in (*self.output, *self.layers)}
        self._failed: list[str] = []  # not raised within the training step
        self._seen: dict[str, list[Any]] = getattr(self, "_seen", {})
        self._taught: dict[str, list[Any]] = getattr(self, "_taught", {})
        self._seen.clear()
        self._taught.clear()

    # --- hooks ---

    def _watching(self) -> bool:
        """In a backward pass checkpointed blocks run a second time."""
        return self.open and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1

    def _tap(self, module: nn.Module, into: dict[str, list[Any]], name: str, student: bool) -> None:
        def keep(_: nn.Module, args: Any, output: Any) -> None:
            if not student or (self._stack and torch._C._current_graph_task_id() == -1):
                into.setdefault(name, []).append(output)

        self._handles.append(module.register_forward_hook(_Hook(keep)))

    def _hooks(self, name: str) -> tuple[_Hook, _Hook]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._watching():
                return
            if self.redirected and not name and not self._inside:
                self._inside = True
                return
            self._stack.append(name)
            if len(self._stack) == 1:
                self._calls.append(self._follow(name, args, kwargs))

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._watching():
                return
            if not self._stack:
                self._inside = False
                return
            self._stack.pop()
            if not self._stack:
                self._finish(self._calls[-1], output)

        return _Hook(before), _Hook(after)

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """Call the teacher on the same inputs; outputs of earlier calls among them are the teacher's own."""
        known: dict[int, Any] = {}
        call = _Call(name, {key: kwargs[key] for key in ("attention_mask", "labels") if key in kwargs})
        inputs = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for earlier in self._calls:
            theirs = zip(tree_leaves(earlier.output), tree_leaves(earlier.taught), strict=False)
            mine = {id(one): two for one, two in theirs if id(one) in inputs}
            if mine and earlier.reason:
                call.reason = earlier.reason
            earlier.used = earlier.used or bool(mine) or any(id(leaf) in inputs for leaf in tree_leaves(earlier.output))
            known.update(mine)
        made = [leaf for key, leaf in inputs.items() if leaf.grad_fn is not None and key not in known]
        if self._calls and made and not call.reason:
            call.reason = (
                f"{name or 'the model'} is called with what the training step has computed from other modules' outputs, which the "
                f"teacher cannot follow: put it into one forward (self(x)), or compare another output"
            )
        if self.teacher.whole and any(earlier.name != name for earlier in self._calls) and not call.reason:
            told = ", ".join(dict.fromkeys(earlier.name or "the model" for earlier in self._calls))
            call.reason = (
                f"the training step calls {told} and {name or 'the model'}, and the teacher is one module that is called in the "
                f"place of one: call one module (such as self(x)), or give a LightningModule with the same names as teacher"
            )
        if not call.reason:  # a copy of the inputs, into which a model may write
            args, kwargs = tree_map_only(
                Tensor, lambda leaf: known[id(leaf)] if id(leaf) in known else leaf.detach().clone(), (args, kwargs)
            )
            call.taught = self.teacher(name, args, kwargs)
        return call

    def _finish(self, call: _Call, output: Any) -> None:
        call.output = output
        for name in self._pairs:
            mine, theirs = self._seen.pop(name, []), self._taught.pop(name, [])
            if name in self.output and mine and not theirs and self.teacher.find(name) is None:
                theirs = [call.taught]  # a teacher of other names has one output
            if mine and call.reason:
                self._failed.append(call.reason)
            elif len(mine) != len(theirs):
                self._failed.append(
                    f"{name}: ran {len(mine)} times in the student and {len(theirs)} times in the teacher for one call of "
                    f"{call.name or 'the model'}, so outputs cannot be paired: compare modules that both always run"
                )
            else:
                take = main_tensor if name in self.output else first_tensor
                pairs = [self._pair(name, take(one), take(two), call) for one, two in zip(mine, theirs, strict=True)]
                self._pairs[name] += [pair for pair in pairs if pair is not None]

    def _pair(self, name: str, student: Tensor | None, teacher: Tensor | None, call: _Call) -> Pair | None:
        told = name or "the model"
        if student is None or teacher is None:
            who = "the student's" if student is None else "the teacher's"
            self._failed.append(f"{told}: {who} output is no float tensor (nor has logits): name a module that returns one")
            return None
        if not student.requires_grad:
            self._failed.append(
                f"{told}: the student's output has no gradient (a frozen module, no_grad, or checkpointing with "
                f"use_reentrant=True): name a module that is trained"
            )
            return None
        return Pair(told, student, teacher, call.keywords, self.shifted)

    # --- results ---

    def take(self, outputs: bool) -> tuple[list[Pair], list[Pair]]:
        """The pairs since the last time: of outputs, and of layers. Both empty: the student was not called.

        Args:
            outputs: whether outputs are wanted.

        Raises:
            ValueError: what was called gives no pair, or several modules could be the output.
        """
        calls, pairs, inside = self._calls, self._pairs, self._inside
        last = self._last(calls) if outputs and not self.output else []
        failed = self._failed
        self.start()
        self._inside = inside
        if not calls:
            return [], []
        silent = [name for name, found in pairs.items() if not found]
        if silent:
            failed.append(f"{', '.join(silent)}: did not run in the training step's calls of the model")
        if failed:
            raise ValueError(failed[0])
        return last or [pair for name in self.output for pair in pairs[name]], [
            pair for name in self.layers for pair in pairs[name]
        ]

    def _last(self, calls: list[_Call]) -> list[Pair]:
        """What calls have returned that no other call took in."""
        last = [call for call in calls if not call.used and main_tensor(call.output) is not None]
        names = list(dict.fromkeys(call.name for call in last))
        self._failed += [call.reason for call in calls if call.reason]
        if calls and len(names) != 1:
            told = ", ".join(name or "the model" for name in names or dict.fromkeys(call.name for call in calls))
            why = "several could be meant" if names else "none returns a float tensor, or logits"
            self._failed.append(f"which output is to be distilled? The training step calls {told}, and {why}: give output='...'")
        pairs = [
            self._pair(call.name, main_tensor(call.output), main_tensor(call.taught), call) for call in last if not call.reason
        ]
        return [pair for pair in pairs if pair is not None]
