"""Packed models as a start for QAT: the same codes until a step is taken, better ones after."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_quant as lq
from lightning_quant.methods import METHODS
from lightning_quant.spec import PRESETS
from lightning_quant.surgery import fake_modules, get_info, packed_modules
from tests.digits import Classifier, Digits, trainer
from tests.helpers import assert_close, assert_same
from tests.nn.cases import BY_ID, FIRST
from tests.nn.test_modules import LARGE, Holder

LEARNING = [name for name, method in METHODS.items() if method.weight.fake is not None and method.bits is None]
INTEGERS = [name for name, preset in PRESETS.items() if preset.scheme.weight.is_int]


def packed_codes(model: nn.Module) -> dict[str, Any]:
    packed = packed_modules(model).items()
    return {f"{name}.{key}": value.clone() for name, part in packed for key, value in part.state_dict().items() if "weight" in key}


@pytest.mark.parametrize("preset", INTEGERS)
@pytest.mark.parametrize("case_id", [case.id for case in FIRST if case.kind not in LARGE])
def test_every_type_and_preset_is_where_it_was(case_id: str, preset: str) -> None:
    case = BY_ID[case_id]
    torch.manual_seed(1)
    plain, args = Holder(case.build()).eval(), case.args()
    recipe = lq.Recipe(schemes={"0*": preset}, weight_observer="mse")  # not the range that values on the grid have
    packed = lq.quantize(plain, recipe, [0], forward=lambda model, batch: model(*args, **case.kwargs))
    before = packed_codes(packed)
    model = lq.unpack(packed)
    with torch.no_grad():
        assert_close(model.eval()(*args, **case.kwargs), packed(*args, **case.kwargs), 1e-5)
        again = lq.convert(model)
        assert_same(again(*args, **case.kwargs), packed(*args, **case.kwargs))
    assert packed_codes(again).keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in packed_codes(again).items())
    assert all(torch.equal(value, before[key]) for key, value in packed_codes(packed).items())
    assert all(value.requires_grad for value in model.parameters())


RECIPE: dict[str, Any] = {"scheme": "w4a16", "group_size": 32, "symmetric": False, "bits": 2}


@pytest.fixture(scope="module")
def start() -> tuple[Classifier, Any]:
    """A float classifier and its 2-bit self by GPTQ."""
    L.seed_everything(0, verbose=False)
    model = Classifier()
    trainer(3).fit(model, datamodule=Digits())
    return model, trainer().quantize(model, datamodule=Digits(), recipe=lq.Recipe(**RECIPE, algorithms=["gptq"]))


def loss(model: L.LightningModule) -> float:
    data = Digits()
    data.setup("validate")
    images, labels = data.val.tensors
    with torch.no_grad():
        return nn.functional.cross_entropy(model.eval()(images), labels).item()


@pytest.mark.parametrize("method", LEARNING)
def test_qat_goes_on_from_there(start: tuple[Classifier, Any], method: str) -> None:
    model, packed = start
    for rate, epochs in ((0.0, 1), (5e-3, 3)):
        student = lq.unpack(packed, method=method)
        student.hparams.lr = rate
        L.seed_everything(0, verbose=False)
        teacher = lq.DistillationCallback(teacher=model)
        fit = trainer(epochs, lq.QATCallback(lq.Recipe(**RECIPE), method=method, scale_lr=0.1), teacher, gradient_clip_val=1.0)
        fit.fit(student, datamodule=Digits())
        after = fit.quantize()
        same = [torch.equal(one, two) for one, two in zip(packed_codes(after).values(), packed_codes(packed).values(), strict=True)]
        if rate:
            assert not all(same)
            assert loss(after) < 0.8 * loss(packed)
        else:
            assert all(same)


def test_a_killed_run_resumes_to_the_bit(start: tuple[Classifier, Any], tmp_path: Path) -> None:
    model, packed = start

    def fit(student: Any, **options: Any) -> dict[str, Any]:
        L.seed_everything(3, verbose=False)
        callbacks = [lq.QATCallback(lq.Recipe(**RECIPE), method="lsq"), lq.DistillationCallback(teacher=model)]
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        run = trainer(2, *callbacks, saving, lq.RandomStateCallback(), enable_checkpointing=True)
        run.fit(student, datamodule=Digits(), **options)
        return packed_codes(run.quantize())

    whole = fit(lq.unpack(packed))
    resumed = fit(lq.unpack(packed), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    assert not all(torch.equal(value, whole[name]) for name, value in packed_codes(packed).items())


def test_it_is_a_prepared_model_like_any_other(start: tuple[Classifier, Any]) -> None:
    _, packed = start
    model, fresh = lq.unpack(packed), lq.prepare(Classifier(), lq.Recipe(**RECIPE), method="lsq")
    assert get_info(model).recipe == lq.Recipe(**RECIPE)
    assert fake_modules(model).keys() == fake_modules(fresh).keys()
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        want = model.eval()(images)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), lq.unpack(copy.deepcopy(packed))):
            assert torch.equal(again.eval()(images), want)
        other = lq.unpack(packed)
        for value in other.parameters():
            value.add_(0.1)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.eval()(images), want)


def test_weights_that_were_shared_are_shared() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    net[2].weight = net[0].weight
    model = lq.unpack(lq.quantize(net, "w4a16"))
    assert model[2].weight is model[0].weight


def test_refusals(start: tuple[Classifier, Any]) -> None:
    model, packed = start
    with pytest.raises(ValueError, match="nothing to unpack"):
        lq.unpack(model)
    for method in METHODS.keys() - LEARNING - {"ternary", "binary"}:
        with pytest.raises(ValueError, match=f"method='{method}' measures the ranges of weights anew.*lsq"):
            lq.unpack(packed, method=method)
    for method, entry in METHODS.items():
        if entry.bits is not None:
            few = lq.quantize(nn.Sequential(nn.Linear(32, 8)), lq.Recipe("w2a16", group_size=32, symmetric=True, edges=None))
            with pytest.raises(ValueError, match=rf"0.weight: method='{method}' has the codes .* only.*method='lsq'"):
                lq.unpack(few, method=method)
    for kind in LARGE:
        with pytest.raises(ValueError, match=f"Packed{kind.__name__} cannot be unpacked: train the float model"):
            lq.unpack(lq.quantize(Holder(kind(8, 2)), "w4a16"))
    outliers = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    rescaled = lq.quantize(outliers, lq.Recipe("w4a16", algorithms=["awq"]), [torch.randn(64, 32) * torch.logspace(0, 3, 32)])
    with pytest.raises(ValueError, match="rescales its input.*explicit=False"):
        lq.unpack(rescaled)
