"""DistillationCallback: what it adds to which loss, its teacher, and what it leaves behind."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import lightning_quant as lq
from lightning_quant.calibration import quantizers
from lightning_quant.distillation import LOSSES, Pair, pair_loss
from tests.callbacks.distillation_worker import STRATEGIES, train
from tests.digits import Classifier, Digits, accuracy, trainer
from tests.helpers import assert_same_state
from tests.launching import launch

ALPHA, TEMPERATURE = 0.3, 2.0


# --- models that call their parts in every way ----------------------------------------------------------------------


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)) for _ in range(count)]


def loader(count: int = 4) -> DataLoader:
    return DataLoader(batches(count), batch_size=None)


class Model(L.LightningModule):
    """Dropout, a metric and a criterion beside what is taught."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 12), nn.Tanh())
        self.head = nn.Linear(12, 4)
        self.criterion = nn.CrossEntropyLoss()
        self.accuracy = MulticlassAccuracy(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def logits(self, x: Tensor) -> Tensor:
        return self(x)

    def task(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(logits, labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.logits(batch[0])
        self.accuracy(logits, batch[1])
        loss = self.task(logits, batch[1])
        self.log("task", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.2, momentum=0.9)


class Chained(Model):
    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Whole(Model):
    """One part is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(self.body, self.head)
        del self.body, self.head

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)


class Listed(Model):
    """The parts in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.ModuleList([self.body]), "b": self.head})
        del self.body, self.head

    def logits(self, x: Tensor) -> Tensor:
        return self.parts["b"](self.parts["a"][0](x))


class Twice(Model):
    """Two calls a step, and one that is none of training."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self(batch[0] + 1)
        one, two = self(batch[0]), self(-batch[0])
        return self.task(one, batch[1]) + self.task(two, batch[1])


class Dicts(Model):
    """A mapping with logits, keywords, and a dict from the step."""

    def forward(self, *, pixels: Tensor) -> dict[str, Tensor]:
        return {"hidden": pixels, "logits": super().forward(pixels)}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.task(self(pixels=batch[0])["logits"], batch[1]), "other": batch[1]}


class Checkpointed(Model):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: super(Checkpointed, self).forward(x), x, use_reentrant=False)


class Noisy(Model):
    """What the step does to its inputs is not done again for the teacher, nor what the model does to them seen by it."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return super().forward(2 * x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.task(self(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[1])


class Manual(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.task(self(batch[0]), batch[1])
        self.manual_backward(loss)
        # a second backward pass, of something that no teacher knows
        self.manual_backward(1e-3 * sum(value.square().sum() for value in self.parameters()))
        optimizer.step()


class Quadratic(Model):
    """LBFGS runs the step several times a batch."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)


MODELS: list[type[Model]] = [
    *(Model, Chained, Whole, Listed, Twice, Dicts, Checkpointed, Noisy, Manual, Quadratic),
]


def inner(model: Any, x: Tensor) -> Tensor:
    """What the parts of any of these models compute."""
    if hasattr(model, "net"):
        return model.net(x)
    return model.parts["b"](model.parts["a"][0](x)) if hasattr(model, "parts") else model.head(model.body(x))


def written_out(cls: type[Model], loss: str = "kl") -> type[Model]:
    """The same model with distillation in its own loss, by a teacher that it holds and calls on its first layer's inputs."""

    class Written(cls):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.taught = [copy.deepcopy(self).eval().requires_grad_(False)]
            self.added: list[float] = []
            self.inputs: list[Tensor] = []
            first = next(part for part in self.modules() if isinstance(part, nn.Linear))
            first.register_forward_pre_hook(self.see)

        def see(self, _: Any, args: Any) -> None:
            if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
                self.inputs.append(args[0].detach().clone())

        def task(self, logits: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = inner(self.taught[0], self.inputs.pop(0))
            found = pair_loss(loss, Pair("", logits, wanted, {}), temperature=TEMPERATURE)
            self.added.append(found.item())
            return (1 - ALPHA) * super().task(logits, labels) + ALPHA * found / (2 if cls is Twice else 1)

    return Written


def callback(*args: Any, **options: Any) -> lq.DistillationCallback:
    return lq.DistillationCallback(*args, **{"alpha": ALPHA, "temperature": TEMPERATURE, "dtype": "float32", **options})


def fitted(model: Model, *callbacks: L.Callback, epochs: int = 2, **options: Any) -> lq.Trainer:
    torch.manual_seed(0)
    host = trainer(epochs, *callbacks, **options)
    host.fit(model, loader())
    return host


def assert_close_state(one: nn.Module, two: nn.Module, tol: float = 1e-6) -> None:
    theirs = two.state_dict()
    for name, value in one.state_dict().items():
        assert torch.allclose(value, theirs[name], rtol=tol, atol=tol), name


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_training_is_that_of_a_step_with_the_term_written_out(cls: type[Model]) -> None:
    model, written = cls(), written_out(cls)()
    start = copy.deepcopy(model.state_dict())
    fitted(model, callback())
    fitted(written)
    assert_close_state(model, written, 1e-5 if cls is Quadratic else 1e-6)
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())
    plain = cls()
    fitted(plain)
    assert any((value - plain.state_dict()[name]).abs().max() > 1e-3 for name, value in model.state_dict().items())


@pytest.mark.parametrize("loss", [name for name, entry in LOSSES.items() if entry.of == "output"])
@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}, {"precision": "64-true"}],
    ids=str,
)
def test_under_options_of_the_trainer(loss: str, options: dict[str, Any]) -> None:
    model, written = Model(), written_out(Model, loss)()
    if options.get("precision") == "64-true":
        written.taught[0].double()
    fitted(model, callback(loss=loss), **options)
    fitted(written, **options)
    assert_close_state(model, written, 2e-3 if options.get("precision") == "bf16-mixed" else 1e-6)


def test_a_scaled_loss_gets_a_scaled_term() -> None:
    def scaled() -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}

    model, written = Model(), written_out(Model)()
    fitted(model, callback(), **scaled())
    fitted(written, **scaled())
    assert_close_state(model, written, 2e-3)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "auto"])
def test_every_precision_trains(precision: str, dtype: str) -> None:
    model = Model()
    seen: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append(trainer.callback_metrics["distill/loss"].item())

    host = fitted(model, callback(dtype=dtype), Watch(), precision=precision)
    assert host.global_step == 8
    assert all(0 < value < 5 for value in seen)


def test_what_is_logged_is_clear() -> None:
    """The step's own loss under its own name, and the distillation before its share is taken."""
    logged: list[dict[str, float]] = []
    outputs: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, output: Any, *args: Any) -> None:
            logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})
            outputs.append(2 * output["loss"].item())  # over accumulated batches

    model, written = Model(), written_out(Model)()
    fitted(model, callback(), Watch(), accumulate_grad_batches=2)
    fitted(written, accumulate_grad_batches=2)
    assert [one["distill/loss"] for one in logged] == pytest.approx(written.added, rel=1e-5)
    assert [one["task"] for one in logged] == pytest.approx(outputs, rel=1e-6)


def layers_of(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: found.update({name: out}))
    model(x)
    return found


@pytest.mark.parametrize("loss", [name for name, entry in LOSSES.items() if entry.of == "layers"])
def test_layers_are_compared_with_the_teachers(loss: str) -> None:
    class Still(Model):
        """Dropout off, so that one step can be written out."""

        def __init__(self) -> None:
            super().__init__()
            self.body[3].p = 0.0

    teacher = Still()
    with torch.no_grad():
        for value in teacher.parameters():
            value.add_(0.1)
    model, written = Still(), Still()
    host = trainer(1, callback(teacher, loss, layers=["body.0", "re:body[.]4"]), limit_train_batches=1)
    host.fit(model, loader())
    names = ["body.0", "body.4"]
    x, labels = batches()[0]
    written.train()
    mine, theirs = layers_of(written, ["", *names], x), layers_of(copy.deepcopy(teacher).eval(), names, x)
    each = [pair_loss(loss, Pair(name, mine[name], theirs[name], {})) for name in names]
    total = (1 - ALPHA) * written.criterion(mine[""], labels) + ALPHA * (each[0] + each[1]) / 2
    total.backward()
    assert host.callback_metrics["distill/loss"].item() == pytest.approx((each[0] + each[1]).item() / 2, rel=1e-5)
    for name, value in written.named_parameters():
        expected = value.detach() - 0.2 * value.grad
        assert torch.allclose(dict(model.named_parameters())[name], expected, atol=1e-6), name


def test_several_losses_add_up() -> None:
    class Other(Model):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                for value in self.parameters():
                    value.add_(0.2)

    def first(loss: Any, **options: Any) -> float:
        host = fitted(Model(), callback(Other(), loss, **options), epochs=1, limit_train_batches=1)
        return host.callback_metrics["distill/loss"].item()

    alone = [first("kl"), first("features", layers="body"), first("cosine", layers="body")]
    together = first({"kl": 0.5, "features": 2, "cosine": 1.0}, layers="body")
    assert together == pytest.approx(0.5 * alone[0] + 2 * alone[1] + alone[2], rel=1e-5)
    assert first(["kl", "features"], layers="body") == pytest.approx(alone[0] + alone[1], rel=1e-5)


def test_an_inner_output_can_be_named() -> None:
    teacher = Model()
    with torch.no_grad():
        teacher.body[4].weight.add_(0.3)
    host = fitted(Model(), callback(teacher, "mse", output="body.4"), epochs=1, limit_train_batches=1)
    model, x = Model().train(), batches()[0][0]
    torch.manual_seed(0)
    loss = pair_loss("mse", Pair("", model.body[:5](x), teacher.eval().body[:5](x), {}))
    assert host.callback_metrics["distill/loss"].item() == pytest.approx(loss.item(), rel=0.3)  # another dropout


# --- errors ---------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "loss": ({"loss": "l1"}, r"loss=\['l1'\]: valid are kl, mse, features, cosine"),
    "no loss": ({"loss": []}, "valid are kl"),
    "weight": ({"loss": {"kl": 0}}, "a weight is a positive number"),
    "alpha": ({"alpha": 1.5}, "alpha=1.5"),
    "no alpha": ({"alpha": 0}, "alpha=0"),
    "temperature": ({"temperature": 0.0}, "temperature=0.0"),
    "teacher": ({"teacher": 3}, "teacher=3: give a module, a checkpoint's path"),
    "dtype": ({"dtype": "int8"}, "dtype='int8': valid are auto, bfloat16, float32"),
    "no layers": ({"loss": "features"}, "name them, such as layers="),
    "layers of nothing": ({"layers": ["body"]}, "none of kl looks at it; features, cosine do"),
    "output of nothing": ({"loss": "cosine", "layers": ["body"], "output": "head"}, "none of cosine looks at it; kl, mse do"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_raise_at_once(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(MisconfigurationException, match=message):
        lq.DistillationCallback(**options)


class Loss(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.head.weight.sum() + self.body[0].weight.sum()) * 1.0


class Flattened(Model):
    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) * 2)


class TwoHeads(Model):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self.other(batch[0]), batch[1]) + self.criterion(self(batch[0]), batch[1])


class Unused(Model):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, 4)


class Reentrant(Model):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: super(Reentrant, self).forward(x), x.requires_grad_(), use_reentrant=True)


class Direct(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.criterion(self(batch[0]), batch[1]).backward()


class Root(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.criterion(self(batch[0]), batch[1]).sqrt())


class Wide(Model):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 7)


class Bare(nn.Module):
    """A teacher of other names."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.trunk, self.top = nn.Linear(6, 12), nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.trunk(x).tanh())


WRONG: dict[str, tuple[type[Model], dict[str, Any], str]] = {
    "nothing is called": (Loss, {}, r"Loss.training_step calls neither the model \(self\(x\)\) nor a direct part"),
    "computed between": (Flattened, {}, "head is called with what the training step has computed"),
    "two outputs": (TwoHeads, {}, "calls other, the model, and several could be meant: give output="),
    "no gradient": (Reentrant, {"loss": "features", "layers": "body"}, "body: the student's output has no gradient"),
    "another shape": (Model, {"teacher": Wide()}, r"student's output has shape \[8, 4\], the teacher's \[8, 7\]"),
    "another shape, bare": (Model, {"teacher": Bare(5)}, r"the model: the student's output has shape \[8, 4\], .*\[8, 5\]"),
    "layers": (Model, {"loss": "cosine", "layers": "bodie.*"}, "'bodie.*' names no module of Model; it has body, body.0"),
    "output": (Model, {"output": "heads"}, "'heads' names no module of Model"),
    "layers of the teacher": (Model, {"teacher": Bare(), "loss": "cosine", "layers": "body"}, "body has no 'body' beside it"),
    "a chain and one module": (Chained, {"teacher": Bare()}, "calls body and head, and the teacher is one module"),
    "no such file": (Model, {"teacher": "nowhere.ckpt"}, "'nowhere.ckpt' does not exist"),
    "not Lightning's backward": (Direct, {}, "call self.manual_backward"),
    "a loss that is needed": (Root, {}, r"give manual_backward\(1.0 \* loss\)"),
    "did not run": (Unused, {"output": "other"}, "other: did not run in the training step's calls"),
    "a number": (Chained, {"output": "criterion"}, "criterion: the student's output is no float tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_says_so_and_leaves_nothing(case: str) -> None:
    cls, options, message = WRONG[case]
    model = cls()
    with pytest.raises(MisconfigurationException, match=message):
        fitted(model, callback(**options))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


# --- teachers -------------------------------------------------------------------------------------------------------


def test_a_module_of_other_names_teaches() -> None:
    teacher = Bare()
    before = copy.deepcopy(teacher.state_dict())
    model = Whole()
    names = {"net.0": "trunk"}
    fitted(model, callback(teacher, {"kl": 1, "cosine": 1}, layers=names), epochs=1)
    assert teacher.training
    assert all(value.requires_grad for value in teacher.parameters())
    assert_same_state(teacher.state_dict(), before)

    class Named(Bare):
        """Layers with the ending of the student's names are found."""

        def __init__(self) -> None:
            super().__init__()
            setattr(self, "0", self.trunk)
            del self.trunk

        def forward(self, x: Tensor) -> Tensor:
            return self.top(self.get_submodule("0")(x).tanh())

    host = fitted(Whole(), callback(Named(), "features", layers="net.0"), epochs=1)
    assert host.callback_metrics["distill/loss"] > 0


@pytest.mark.parametrize("kind", ["path", "module"])
def test_a_given_teacher_is_not_saved_and_must_come_again(kind: str, tmp_path: Path) -> None:
    source = Model()
    host = fitted(source, enable_checkpointing=False)
    path = str(tmp_path / "float.ckpt")
    host.save_checkpoint(path)

    def teacher() -> Any:
        if kind == "path":
            return path
        other = Model()
        other.load_state_dict(source.state_dict())
        return other

    whole = fitted(Model(), callback(teacher()), epochs=2)
    host = fitted(Model(), callback(teacher()), epochs=1)
    saved = str(tmp_path / "taught.ckpt")
    host.save_checkpoint(saved)
    state = torch.load(saved, weights_only=True)["callbacks"]["DistillationCallback"]
    assert list(state) == ["teacher"]
    model = Model()
    again = trainer(2, callback(teacher()))
    torch.manual_seed(0)
    again.fit(model, loader(), ckpt_path=saved)
    assert again.global_step == whole.global_step
    with pytest.raises(MisconfigurationException, match="another teacher: its weights have SHA-256"):
        trainer(2, callback(Model())).fit(Model(), loader(), ckpt_path=saved)


def test_the_float_start_teaches_whatever_the_order(trained: Classifier) -> None:
    """The same teacher before and after QATCallback; it computes in float, and the student in 2 bits."""
    found = []
    for first in (True, False):
        model = Classifier(lr=1e-3)
        model.load_state_dict(trained.state_dict())
        distill, qat = callback(), lq.QATCallback("w2a2", method="lsq")
        callbacks = (distill, qat) if first else (qat, distill)
        torch.manual_seed(0)
        host = trainer(1, *callbacks, limit_train_batches=6, limit_val_batches=0)
        host.fit(model, datamodule=Digits())
        assert distill._made is not None
        teacher = distill._made[1]
        x = torch.rand(4, 1, 8, 8)
        with torch.no_grad():
            assert torch.allclose(teacher("", (x,), {}), trained.eval()(x), atol=1e-5)
        assert all(quantizer.quantizing for quantizer in quantizers(model))
        found.append((model.state_dict(), distill.state_dict()["teacher"], host.callback_metrics["distill/loss"]))
    assert_same_state(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert found[0][2] > 0.05


def test_the_teacher_is_small_and_apart() -> None:
    class Watch(L.Callback):
        def on_train_batch_end(self, host: Any, module: Any, *args: Any) -> None:
            taught = {id(value) for value in distill._made[1].module.parameters()}
            assert not taught & {id(value) for group in host.optimizers[0].param_groups for value in group["params"]}
            assert not taught & {id(value) for value in module.parameters()}
            assert list(module.state_dict()) == names

    model, distill = Model(), callback(dtype="bfloat16")
    names = list(model.state_dict())
    fitted(model, distill, Watch())
    teacher = distill._made[1].module
    assert {value.dtype for value in teacher.parameters() if value.dim() > 1} == {torch.bfloat16}
    assert {value.dtype for value in teacher.parameters() if value.dim() == 1} == {torch.float32}
    assert not any(value.requires_grad for value in teacher.parameters())
    assert not any(part.training for part in teacher.modules())


NETS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(6, 8, batch_first=True),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 16, batch_first=True), 2),
    "conv": lambda: nn.Sequential(nn.Conv1d(5, 8, 1), nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.Conv1d(8, 8, 3)),
    "attention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
}


@pytest.mark.parametrize("name", NETS)
def test_bfloat16_teachers_of_every_kind(name: str) -> None:
    class Sequences(Model):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.net = NETS[name]()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0][:, None].repeat(1, 5, 1)
            output = self.net(x, x, x)[0] if name == "attention" else self.net(x)
            return (output[0] if isinstance(output, tuple) else output).square().mean()

    distill = callback(loss="features", layers="net", dtype="bfloat16")
    host = fitted(Sequences(), distill)
    assert 0 < host.callback_metrics["distill/loss"] < 2
    x = torch.randn(4, 5, 6)
    args = (x, x, x) if name == "attention" else (x,)
    taught = torch.utils._pytree.tree_leaves(distill._made[1]("net", args, {}))[0]
    with torch.no_grad():
        start = torch.utils._pytree.tree_leaves(Sequences().eval().net(*args))[0]
    assert (taught.float() - start).abs().max() < 0.03 * start.abs().max()


# --- what is left behind --------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


class Stops(L.Callback):
    def __init__(self, at: str) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if self.at == "batch" and trainer.global_step == 3:
            raise Stop

    def on_before_backward(self, trainer: Any, *args: Any) -> None:
        if self.at == "backward" and trainer.global_step == 3:
            raise Stop


@pytest.mark.parametrize("how", ["ends", "batch", "backward"])
def test_the_module_is_as_it_was(how: str) -> None:
    model = Model()
    distill = callback()
    if how == "ends":
        fitted(model, distill)
    else:
        with pytest.raises(Stop):
            fitted(model, distill, Stops(how))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert type(pickle.loads(pickle.dumps(model.eval()))) is Model
    assert_same_state(copy.deepcopy(model).state_dict(), model.state_dict())
    # a second fit, by the same teacher
    before = distill.state_dict()["teacher"]
    fitted(model.train(), distill)
    assert distill.state_dict()["teacher"] == before
    pickle.loads(pickle.dumps(distill))


def test_copies_made_in_training_are_not_watched() -> None:
    class Copies(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                other(batches()[0][0])

    model, plain = Model(), Model()
    fitted(model, callback(), Copies())

    class Draws(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            for _ in range(2):
                copy.deepcopy(module)(batches()[0][0])  # the same random numbers

    fitted(plain, callback(), Draws())
    assert_same_state(model.state_dict(), plain.state_dict())


def test_averages_validation_and_qat_beside_it(trained: Classifier) -> None:
    trained.hparams.lr = 1e-3
    callbacks = (lq.QATCallback("w4a4", method="lsq"), EMAWeightAveraging(decay=0.8), callback(dtype="auto"))
    host = trainer(2, *callbacks, val_check_interval=0.5)
    host.fit(trained, datamodule=Digits())
    assert accuracy(host.quantize()) > 90


def test_only_a_fit_makes_a_teacher(trained: Classifier) -> None:
    distill = callback()
    host = trainer(1, distill)
    host.validate(trained, datamodule=Digits(), verbose=False)
    assert distill._made is None


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("qat", ["first", "last", "none"])
def test_a_resumed_run_ends_to_the_bit(dtype: str, qat: str, trained: Classifier, tmp_path: Path) -> None:
    def run(epochs: int, folder: str, start: dict[str, Tensor] | None, resume: str | None = None) -> tuple[Any, Any]:
        L.seed_everything(0 if resume is None else 1, verbose=False)
        model = Classifier(lr=1e-3)
        if start is not None:
            model.load_state_dict(start)
        distill = callback(dtype=dtype)
        quant = [lq.QATCallback("w2a2", method="lsq")] if qat != "none" else []
        callbacks = [*quant, distill] if qat == "first" else [distill, *quant]
        saves = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        host = trainer(
            epochs, *callbacks, lq.RandomStateCallback(), saves, enable_checkpointing=True, limit_train_batches=6,
            accumulate_grad_batches=2, num_sanity_val_steps=0,
        )  # fmt: skip
        host.fit(model, datamodule=Digits(), ckpt_path=resume)
        return model.state_dict(), distill

    whole, teacher = run(3, "whole", trained.state_dict())
    # the process that goes on knows nothing of the float start
    resumed, other = run(3, "resumed", None, resume=str(tmp_path / "whole" / "epoch=0.ckpt"))
    assert_same_state(resumed, whole)
    assert other.state_dict()["teacher"] == teacher.state_dict()["teacher"]
    state = torch.load(tmp_path / "whole" / "epoch=0.ckpt", weights_only=True)
    held = state["callbacks"]["DistillationCallback"]["weights"]
    assert {value.dtype for name, value in held.items() if value.dim() > 1} == {getattr(torch, dtype)}
    assert not any("fake_quant" in name for name in held)
    assert not any("teacher" in name for name in state["state_dict"])


def test_a_teacher_that_is_not_saved_has_to_be_the_same(tmp_path: Path) -> None:
    host = fitted(Model(), callback(save_teacher=False), epochs=1)
    host.save_checkpoint(tmp_path / "one.ckpt")
    assert "weights" not in torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]["DistillationCallback"]
    trainer(2, callback(save_teacher=False)).fit(Model(), loader(), ckpt_path=str(tmp_path / "one.ckpt"))
    other = Model()
    with torch.no_grad():
        other.head.bias.add_(1)
    with pytest.raises(MisconfigurationException, match="the model as this run has started with it"):
        trainer(2, callback(save_teacher=False)).fit(other, loader(), ckpt_path=str(tmp_path / "one.ckpt"))


def test_a_float_run_that_goes_on_teaches_itself(tmp_path: Path) -> None:
    """The weights in the checkpoint are the float start, not those that the process began with."""
    source = Model()
    fitted(source).save_checkpoint(tmp_path / "float.ckpt")
    other = Model()
    with torch.no_grad():
        other.head.bias.add_(1)
    distill = callback()
    host = trainer(3, distill, lq.QATCallback("w4a4", method="lsq"))
    host.fit(other, loader(), ckpt_path=str(tmp_path / "float.ckpt"))
    held = distill._made[1].tensors()
    assert_same_state({name: held[name] for name in source.state_dict()}, source.state_dict())
    # a quantized run's float start is gone
    trainer(1, lq.QATCallback("w4a4")).fit(other := Model(), loader())
    host = trainer(1, lq.QATCallback("w4a4"))
    host.fit(other, loader())
    host.save_checkpoint(tmp_path / "qat.ckpt")
    with pytest.raises(MisconfigurationException, match="its model is quantized already: the float start is unknown"):
        trainer(2, callback(), lq.QATCallback("w4a4")).fit(Model(), loader(), ckpt_path=str(tmp_path / "qat.ckpt"))


# --- transformers ---------------------------------------------------------------------------------------------------


def tiny(model: str = "Llama") -> Any:
    import transformers

    torch.manual_seed(3)
    options = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if model == "GPT2":
        config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=32)
        return transformers.GPT2LMHeadModel(config)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=64, num_key_value_heads=2, **options))


class Labelled(L.LightningModule):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch, use_cache=False).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def text() -> dict[str, Tensor]:
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(2))
    attention = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    labels = ids.masked_fill(attention == 0, -100)
    labels[0, :3] = -100  # a prompt
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_causal_language_models(name: str) -> None:
    """Token by token, but for padding, prompts and the last token, whose next is not known."""
    teacher = tiny(name)
    with torch.no_grad():
        for value in teacher.parameters():
            value.mul_(1.3)
    model = Labelled(tiny(name).eval())
    batch = text()
    host = trainer(1, callback(teacher), limit_train_batches=1)
    host.fit(model, DataLoader([batch], batch_size=None))
    known = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        student, wanted = tiny(name).eval()(**known).logits, teacher.eval()(**known).logits
    kept = torch.zeros(2, 9, dtype=torch.bool)
    kept[0, 2:8] = kept[1, :4] = True
    expected = pair_loss("kl", Pair("", student[kept], wanted[kept], {}), temperature=TEMPERATURE)
    assert host.callback_metrics["distill/loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_language_model_under_qat_with_layers() -> None:
    model = lq.CausalLMModule(tiny(), lr=1e-3)
    batch = {key: value for key, value in text().items() if key != "labels"}
    callbacks = (lq.QATCallback("w4a16"), lq.DistillationCallback(loss={"kl": 1.0, "features": 0.1}, layers="model.model.layers.*"))
    layers = ["model.model.layers.0", "model.model.layers.1"]
    with pytest.raises(MisconfigurationException, match="'model.layers.7' names no module"):
        trainer(1, lq.DistillationCallback(loss="cosine", layers="model.layers.7")).fit(model, DataLoader([batch]))
    callbacks[1].layers = layers
    host = trainer(3, *callbacks)
    host.fit(model, DataLoader([batch] * 2, batch_size=None))
    assert host.callback_metrics["distill/loss"] > 0
    assert isinstance(lq.convert(model), lq.CausalLMModule)


def test_gradient_checkpointing_of_transformers() -> None:
    found = []
    for checkpointing in (False, True):
        net = tiny()
        if checkpointing:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = Labelled(net)
        fit = trainer(2, callback(loss={"kl": 1.0, "cosine": 1.0}, layers="re:net.model.layers.[01]$"), lq.QATCallback("w4a16"))
        fit.fit(model, DataLoader([text()] * 2, batch_size=None))
        found.append({name: value for name, value in model.state_dict().items() if name.endswith("weight")})
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-5), name


def test_adapters_on_a_packed_base_are_taught_by_the_float_one(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    net = tiny()
    with torch.no_grad():
        for value in net.parameters():
            value.mul_(4)  # else next to nothing is lost
    model = lq.CausalLMModule(net, lr=1e-2)
    batch = {key: value for key, value in text().items() if key != "labels"}
    distill = callback(alpha=1.0)
    seen: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append(trainer.callback_metrics["distill/loss"].item())

    precision = lq.QuantPrecision("nf4", compute_dtype="fp32")
    adapters = lq.LoRACallback(r=8, adapter_dir=str(tmp_path / "adapter"))
    host = trainer(20, distill, adapters, Watch(), plugins=[precision], fast_dev_run=False)
    host.fit(model, DataLoader([batch], batch_size=None))
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert 0 < seen[-1] < 0.5 * seen[0]  # what packing has cost is learned back
    model = lq.CausalLMModule(tiny())
    with pytest.raises(MisconfigurationException, match="list DistillationCallback before LoRACallback"):
        trainer(1, lq.LoRACallback(r=8), callback(), plugins=[lq.QuantPrecision("nf4")]).fit(model, DataLoader([batch]))


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torch.compile")
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_parts(how: str) -> None:
    model, plain = Whole(), Whole()
    for each in (model, plain):
        each.net[0][3].p = 0.0
    if how == "wrapped":
        model.net = torch.compile(model.net, backend="aot_eager")
    else:
        model.net.compile(backend="aot_eager")
    prefix = "net._orig_mod" if how == "wrapped" else "net"
    fitted(model, callback(loss={"kl": 1, "cosine": 1}, layers=f"{prefix}.0"))
    fitted(plain, callback(loss={"kl": 1, "cosine": 1}, layers="net.0"))
    for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5), name


# --- what it is for -------------------------------------------------------------------------------------------------


def test_two_bits_are_learned_no_worse_than_alone(trained: Classifier) -> None:
    found = {}
    for name in ("alone", "taught"):
        scores = []
        for seed in (0, 1):
            model = Classifier(lr=2e-3)
            model.load_state_dict(trained.state_dict())
            L.seed_everything(seed, verbose=False)
            qat = lq.QATCallback("w2a2", method="lsq")
            host = trainer(4, qat, *([lq.DistillationCallback()] if name == "taught" else []), limit_val_batches=0)
            host.fit(model, datamodule=Digits())
            scores.append(accuracy(model))
        found[name] = sum(scores) / len(scores)
    assert found["taught"] > found["alone"] - 0.5
    assert found["taught"] > 90


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("tests.callbacks.distillation_worker", tmp_path_factory.mktemp("distill"))


@pytest.mark.xdist_group("distillation")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(strategy: str, ranks: Any) -> None:
    alone = train()
    first, second = (rank[strategy] for rank in ranks)
    assert first.keys() == alone.keys()
    for name, value in first.items():
        if name != "loss":  # each rank's own
            assert torch.equal(value, second[name]), name
            assert torch.allclose(value.float(), alone[name].float(), rtol=2e-3, atol=2e-3), name
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(alone["loss"].item(), rel=0.05)


@pytest.mark.xdist_group("distillation")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_resume_to_the_bit(strategy: str, ranks: Any) -> None:
    for rank in ranks:
        assert_same_state(rank[f"{strategy}, resumed"], rank[strategy])
