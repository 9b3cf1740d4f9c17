"""`DistillationCallback`: the float model, or another, teaches the one in training; hooks only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_quant.adapters import hash_tensors
from lightning_quant.algorithms.reconstruction import autocast_dtype
from lightning_quant.checkpoint import restore
from lightning_quant.companions import configure
from lightning_quant.distillation import LOSSES, Pair, pair_loss
from lightning_quant.nn.base import described_modules
from lightning_quant.pairing import Recorder
from lightning_quant.selection import find_modules
from lightning_quant.surgery import is_packed, is_prepared
from lightning_quant.teacher import Teacher, as_teacher

DTYPES = ("auto", "bfloat16", "float32")


def _weights(loss: Any) -> dict[str, float]:
    """Loss -> its weight."""
    if isinstance(loss, str):
        loss = {loss: 1.0}
    elif not isinstance(loss, Mapping):
        loss = dict.fromkeys(loss, 1.0)
    unknown = [name for name in loss if name not in LOSSES]
    if unknown or not loss:
        raise MisconfigurationException(f"DistillationCallback loss={unknown or loss!r}: valid are {', '.join(LOSSES)}")
    for name, weight in loss.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise MisconfigurationException(f"DistillationCallback loss={{{name!r}: {weight!r}}}: a weight is a positive number")
    return {name: float(weight) for name, weight in loss.items()}


class DistillationCallback(L.Callback):
    """Adds to the loss how far the model in training is from a teacher (Hinton et al. 2015, arXiv:1503.02531, section 2).

    The training step stays as it is: whatever module it calls, the teacher is called on the same inputs just before, in eval mode
    and without gradients, and before each backward pass the loss becomes `(1 - alpha) * loss + alpha * distillation`. What the step
    logs and returns stays its own loss; `distill/loss` logs the other. Several calls in a step are averaged.

    The teacher is no part of the model: not of its parameters, its `state_dict`, or what DDP and FSDP2 see. It is kept through
    later fits of the same model. By default it is the model as it is when the fit starts, whose quantizers, if it has any, are off:
    its weights are in every checkpoint (not in weights-only ones), as a resumed run cannot find them elsewhere. Any other teacher
    is not saved; a resumed run has to give it again, and raises if it is not the same to the bit.

    Args:
        teacher: None: the float start; a checkpoint's path or a folder of `lq.save_quantized`, loaded into a copy of the model; or
            a module. A LightningModule has the student's names; any other module is called as a whole, in the place of what the
            training step calls.
        loss: `"kl"` or `"mse"` of logits, `"features"` (relative squared error) or `"cosine"` of layers' outputs; several, or a
            dict of their weights, add up. Tokens that `attention_mask` or `labels` (-100) among a call's keywords leave out do not
            count.
        alpha: between 0 and 1: the share of the distillation.
        temperature: of `"kl"`.
        layers: patterns, as in a `Recipe`, of the layers that `"features"` and `"cosine"` compare; or a dict of the student's names
            to the teacher's.
        output: the names of modules whose outputs are compared (a tensor, or `.logits`); by default what the training step's last
            call of a module with weights returns.
        class_dim: the dimension of classes; by default 1 in outputs of four and more dimensions, else the last.
        dtype: what the teacher's matrices are kept in and multiplied in: `"bfloat16"`, `"float32"` (then as the Trainer's precision
            has it), or `"auto"`: bfloat16 where the machine multiplies it natively.
        save_teacher: whether checkpoints hold the teacher's weights; by default only those of the float start. Without, a resumed
            run must build the same teacher again before its checkpoint is loaded.

    Under manual optimization the loss of a `manual_backward` gets what the model was called with since the one before.

    Raises:
        MisconfigurationException: a bad value; a name that matches nothing; a training step that does not call the model; an output
            of another shape than the teacher's.

    Example:
        >>> callbacks = [DistillationCallback(alpha=0.7, temperature=2.0)]  # with a QATCallback, before or after it
        >>> trainer = L.Trainer(max_epochs=5, callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        teacher: str | nn.Module | None = None,
        loss: Literal["kl", "mse", "features", "cosine"] | Sequence[str] | dict[str, float] = "kl",
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        layers: str | Sequence[str] | dict[str, str] | None = None,
        output: str | Sequence[str] | None = None,
        class_dim: int | None = None,
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        save_teacher: bool | None = None,
    ) -> None:
        super().__init__()
        self.weights = _weights(loss)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= 1:
            raise MisconfigurationException(f"DistillationCallback alpha={alpha!r}: the teacher's share is above 0 and at most 1")
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
            raise MisconfigurationException(f"DistillationCallback temperature={temperature!r}: must be a positive number")
        if dtype not in DTYPES:
            raise MisconfigurationException(f"DistillationCallback dtype={dtype!r}: valid are {', '.join(DTYPES)}")
        if teacher is not None and not isinstance(teacher, (str, os.PathLike, nn.Module)):
            raise MisconfigurationException(
                f"DistillationCallback teacher={teacher!r}: give a module, a checkpoint's path, or None for the float start"
            )
        self.teacher, self.alpha, self.temperature = teacher, alpha, temperature
        self.layers: dict[str, str] | list[str] = (
            dict(layers) if isinstance(layers, Mapping) else [layers] if isinstance(layers, str) else list(layers or [])
        )
        self.output = [output] if isinstance(output, str) else list(output or [])
        self.class_dim, self.dtype = class_dim, dtype
        self.of_outputs = any(LOSSES[name].of == "output" for name in self.weights)
        of_layers = [name for name in self.weights if LOSSES[name].of == "layers"]
        if of_layers and not self.layers:
            raise MisconfigurationException(
                f"DistillationCallback loss={of_layers[0]!r} compares layers: name them, such as layers=['*.layer3', '*.layer4']"
            )
        if (self.layers and not of_layers) or (self.output and not self.of_outputs):
            what, kind = ("layers", "features, cosine") if self.layers and not of_layers else ("output", "kl, mse")
            raise MisconfigurationException(
                f"DistillationCallback {what}={getattr(self, what)!r}: none of {', '.join(self.weights)} looks at it; {kind} do"
            )
        self.save_teacher = teacher is None if save_teacher is None else save_teacher
        self._made: tuple[nn.Module, Teacher] | None = None  # for which model, and the teacher
        self._recorder: Recorder | None = None
        self._names: dict[str, str] = {}
        self._fitting = self._added = False
        self._hash: str | None = None

    # --- the teacher ---

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        self._check_trainer(trainer)
        if is_overridden("configure_model", pl_module) and not isinstance(trainer.strategy, ModelParallelStrategy):
            # its layers must exist before they can be copied; Lightning calls it again, which it has to allow
            configure(trainer, pl_module, type(self).__name__)
        try:
            if self._made is None or self._made[0] is not pl_module:
                self._made, self._hash = (pl_module, self._make(trainer, pl_module)), None
            self._names = self._find_layers(pl_module)
            for name in self.output:
                find_modules(pl_module, [name])
        except (ValueError, FileNotFoundError) as error:
            raise MisconfigurationException(f"DistillationCallback: {error}") from error

    def _check_trainer(self, trainer: L.Trainer) -> None:
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise MisconfigurationException(
                f"DistillationCallback: {type(trainer.strategy).__name__} flattens or partitions parameters, and no module is "
                f"called as it was written: use ModelParallelStrategy (FSDP2) or strategy='ddp'"
            )

    def _make(self, trainer: L.Trainer, module: L.LightningModule) -> Teacher:
        source: nn.Module = module
        if isinstance(self.teacher, nn.Module):
            source = self.teacher
        elif self.teacher is not None:
            if is_prepared(module):
                raise ValueError(
                    f"teacher={os.fspath(self.teacher)!r} is loaded into a copy of the model, which has quantizers already: list "
                    f"DistillationCallback before QATCallback, or give a module"
                )
            source = restore(module, self.teacher)
        elif is_packed(module):
            raise ValueError(
                "the model is packed, and its float weights are gone: list DistillationCallback before LoRACallback, or give "
                "teacher="
            )
        parameters = list(source.parameters())
        if not parameters or any(value.is_meta for value in parameters):
            raise ValueError(
                f"the teacher {type(source).__name__} has no weights yet (made in configure_model, or on the meta device): make "
                f"them in __init__, or give a module that has them as teacher="
            )
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else None
        if self.dtype == "auto":
            dtype = autocast_dtype("auto", trainer.strategy.root_device)
        return as_teacher(source, module, dtype)

    def _find_layers(self, module: nn.Module) -> dict[str, str]:
        """The student's names of layers -> the teacher's."""
        assert self._made is not None
        teacher, found = self._made[1], {}
        if isinstance(self.layers, dict):
            found = dict(self.layers)
            for name in found:
                find_modules(module, [name])
        else:
            for name in find_modules(module, self.layers):
                found[name] = teacher.find(name) or name
        known = [name for name, _ in teacher.module.named_modules()]
        for name, theirs in found.items():
            if theirs not in known:
                raise ValueError(
                    f"layers: {name} has no {theirs!r} beside it in the teacher {type(teacher.module).__name__}, which has "
                    f"{', '.join(known[1:9])}, ...: give layers as a dict of the student's names to the teacher's"
                )
        return found

    # --- the loss ---

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._made is not None
        teacher = self._made[1]
        teacher.module.to(pl_module.device)
        self._leave()
        redirected = trainer.strategy.model is not pl_module
        self._recorder = Recorder(pl_module, teacher, self.output, self._names, redirected)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._recorder is not None
        self._recorder.start()
        self._added = False

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert self._recorder is not None
        try:
            outputs, layers = self._recorder.take(self.of_outputs)
            if not outputs and not layers:
                if self._added and not pl_module.automatic_optimization:
                    return  # a second backward pass of a step
                raise ValueError(
                    f"{type(pl_module).__name__}.training_step calls neither the model (self(x)) nor a direct part of it: call "
                    f"one, or name what it calls by output='...'"
                )
            with torch.enable_grad(), torch.autocast(loss.device.type, enabled=False):
                found = self._loss(outputs, layers)
        except ValueError as error:
            raise MisconfigurationException(f"DistillationCallback: {error}") from error
        self._added = True
        pl_module.log("distill/loss", found.detach(), on_step=True, on_epoch=False, batch_size=1)
        term = found * self.alpha
        if pl_module.automatic_optimization:
            term = term / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if not pl_module.automatic_optimization:
            self._check_loss(loss)
        loss.mul_(1 - self.alpha).add_(term if scaler is None else scaler.scale(term))

    def _loss(self, outputs: list[Pair], layers: list[Pair]) -> Tensor:
        """The weighted sum of all losses, each averaged over its pairs."""
        total: Any = 0.0
        for name, weight in self.weights.items():
            pairs = outputs if LOSSES[name].of == "output" else layers
            each = [pair_loss(name, pair, temperature=self.temperature, class_dim=self.class_dim) for pair in pairs]
            total = total + weight * torch.stack(each).mean()
        return total

    @staticmethod
    def _check_loss(loss: Tensor) -> None:
        """Lightning's own loss is a quotient, which may be changed in place; one of `manual_backward` need not be."""
        if loss.is_leaf or any(name == "_saved_result" for name in dir(loss.grad_fn)):
            raise MisconfigurationException(
                "DistillationCallback adds to the loss in place, and the backward pass of this one needs its value: give "
                "manual_backward(1.0 * loss)"
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        assert self._recorder is not None
        self._recorder.start()
        self._recorder.open = False
        if not self._added and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"DistillationCallback: {type(pl_module).__name__}.training_step went by without a backward pass that Lightning "
                f"knows of: call self.manual_backward(loss), not loss.backward()"
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._leave()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._leave()
        if self._made is not None:
            self._made[1].module.cpu()

    def _leave(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    # --- checkpoints ---

    def _fingerprint(self) -> str:
        assert self._made is not None
        if self._hash is None:
            self._hash = hash_tensors(self._made[1].tensors())
        return self._hash

    def state_dict(self) -> dict[str, Any]:
        """The teacher's hash, and its weights where they are saved."""
        if self._made is None:
            return {}
        saved = {"weights": self._made[1].tensors()} if self.save_teacher else {}
        return {"teacher": self._fingerprint(), **saved}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run without this callback goes on with it: its weights are the float start."""
        if not self._fitting or self.teacher is not None or self.state_key in checkpoint.get("callbacks", {}):
            return
        assert self._made is not None
        state = checkpoint.get("state_dict", {})
        quantized = next((kind for kind in ("packed", "fake") if described_modules(state, kind)), None)
        if quantized or not state:
            raise MisconfigurationException(
                f"DistillationCallback: the checkpoint is of a run without it, and "
                f"{'its model is quantized already' if quantized else 'its weights are in a folder'}: the float start is unknown; "
                f"give teacher="
            )
        self._take_over(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._fitting:
            return
        assert self._made is not None
        if "weights" in state_dict and self.teacher is None:
            self._take_over(state_dict["weights"])
        elif state_dict["teacher"] != self._fingerprint():
            whose = "the model as this run has started with it" if self.teacher is None else "the teacher given"
            raise MisconfigurationException(
                f"DistillationCallback: the run was taught by another teacher: its weights have SHA-256 "
                f"{state_dict['teacher'][:12]}..., those of {whose} {self._fingerprint()[:12]}...: give the same one, in the same "
                f"dtype, or start anew"
            )

    def _take_over(self, tensors: Mapping[str, Tensor]) -> None:
        assert self._made is not None
        try:
            self._made[1].load(tensors)
        except ValueError as error:
            raise MisconfigurationException(f"DistillationCallback: the checkpoint's teacher does not fit: {error}") from error
        self._hash = None
