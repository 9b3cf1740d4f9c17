from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lightning_quant as lq
from lightning_quant.surgery import packed_modules
from tests.digits import Classifier, Digits, trainer


class Tied(nn.Module):
    """A language model's head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.body = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True, dropout=0.0)
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)))


def mlp(width: int = 48) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 6))


def save(tmp_path: Path) -> tuple[nn.Module, Path]:
    qmodel = lq.quantize(mlp(), "w8a8", [torch.randn(16, 40)])
    return qmodel, lq.save_quantized(qmodel, tmp_path / "out")


def weights(folder: Path) -> Path:
    return next(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("recipe", list(lq.PRESETS))
def test_round_trip_of_a_lightning_module(trained: Classifier, tmp_path: Path, recipe: str) -> None:
    qmodel = lq.quantize(trained, recipe, datamodule=Digits())
    lq.save_quantized(qmodel, tmp_path)
    with torch.device("meta"):
        hollow = Classifier()
    hollow.accuracy = Classifier().accuracy
    x = torch.rand(5, 1, 8, 8)
    for module in (Classifier(), hollow):
        again = lq.load_quantized(module, tmp_path)
        assert torch.equal(again(x), qmodel(x))
        assert not again.training
        assert list(again.state_dict()) == list(qmodel.state_dict())
        assert str(lq.summary(again)) == str(lq.summary(qmodel))
        assert not packed_modules(module)  # what was passed in is left as it was


def test_no_float_weight_of_a_packed_module_is_allocated(tmp_path: Path) -> None:
    _, folder = save(tmp_path)
    with torch.device("meta"):
        module = mlp()
    again = lq.load_quantized(module, folder)
    assert all(not value.is_meta for value in again.state_dict().values())
    assert not any(value.is_floating_point() and value.dim() > 1 and value.numel() > 48 for value in again.parameters())


@pytest.mark.parametrize("recipe", [lq.Recipe("w8a16", schemes={"embed": "w8a16", "head": "w8a16"}), lq.Recipe("w8a16")])
def test_tied_weights_stay_tied(tmp_path: Path, recipe: lq.Recipe) -> None:
    qmodel = lq.quantize(Tied(), recipe)
    lq.save_quantized(qmodel, tmp_path)
    again = lq.load_quantized(Tied(), tmp_path)
    x = torch.randint(0, 40, (2, 5))
    assert torch.equal(again(x), qmodel(x))
    name = "weight_packed" if recipe.schemes else "weight"
    assert getattr(again.head, name) is getattr(again.embed, name)
    assert sum("head.weight" in key for key in load_file(weights(tmp_path))) == 0


def test_saving_again_replaces_and_keeps_other_files(tmp_path: Path) -> None:
    _, folder = save(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    lq.save_quantized(lq.quantize(mlp(), "w4a16"), folder)
    assert sorted(path.name.split("-")[0] for path in folder.iterdir()) == ["model", "quantization.json", "tokenizer.json"]
    assert lq.load_quantized(mlp(), folder)[0].scheme.weight.bits == 4


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = save(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        lq.save_quantized(lq.quantize(mlp(), "w4a16"), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def cut(folder: Path) -> None:
    path = weights(folder)
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    path = weights(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "quantization.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "is damaged: its SHA-256.*cut short"),
        (flip, "is damaged: its SHA-256.*a changed byte"),
        (edit(format=99), "has format 99, written by lightning_quant .*upgrade"),
        (edit(format="x"), "is damaged"),
        (lambda folder: (folder / "quantization.json").write_text("{"), "quantization.json is damaged"),
        (lambda folder: weights(folder).unlink(), "does not exist, but quantization.json names it"),
        (lambda folder: (folder / "quantization.json").unlink(), "holds no model written by lq.save_quantized"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    _, folder = save(tmp_path)
    damage(folder)
    module = mlp()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        lq.load_quantized(module, folder)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: mlp(width=49), r"was not made from this Sequential: .*\(4[89],"),
        (lambda: nn.Sequential(nn.Linear(40, 48)), "it has no module '3'"),
        (lambda: nn.Sequential(nn.Conv1d(40, 48, 1), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 6)), "was not made from"),
        (lambda: nn.Sequential(*mlp(), nn.LayerNorm(6)), "the file has no '4.weight'"),
        (lambda: nn.Sequential(nn.ReLU(), *list(mlp())[1:]), "'0' is a ReLU"),
    ],
)
def test_wrong_model(tmp_path: Path, module: Callable[[], nn.Module], message: str) -> None:
    _, folder = save(tmp_path)
    with pytest.raises(ValueError, match=message):
        lq.load_quantized(module(), folder)


def test_a_float_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only a packed model"):
        lq.save_quantized(mlp(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attention_with_parts_left_in_float(tmp_path: Path) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(24, 2, 32, batch_first=True, dropout=0.0))
    qmodel = lq.quantize(model, lq.Recipe("w8a8-dynamic", ignore=["*.out_proj", "*.linear2"]))
    lq.save_quantized(qmodel, tmp_path)
    again = lq.load_quantized(nn.Sequential(nn.TransformerEncoderLayer(24, 2, 32, batch_first=True)), tmp_path)
    x = torch.randn(2, 5, 24)
    assert torch.equal(again(x), qmodel(x))


def test_lightning_checkpoint_of_a_packed_model(trained: Classifier, tmp_path: Path) -> None:
    host = trainer()
    qmodel = host.quantize(trained, datamodule=Digits(), recipe="w4a4")
    host.validate(qmodel, datamodule=Digits(), verbose=False)
    host.save_checkpoint(tmp_path / "packed.ckpt")
    assert torch.load(tmp_path / "packed.ckpt", weights_only=True)
    again = lq.load_from_checkpoint(Classifier, tmp_path / "packed.ckpt")
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(again(x), qmodel(x))
    # and into a packed model of the same recipe, as Lightning itself does it
    other = host.quantize(Classifier(), datamodule=Digits(), recipe="w4a4")
    other.load_state_dict(torch.load(tmp_path / "packed.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(other(x), qmodel(x))


def test_checkpoint_of_another_scheme_raises(trained: Classifier) -> None:
    one, two = (lq.quantize(trained, recipe, datamodule=Digits()) for recipe in ("w8a16", "w4a16"))
    with pytest.raises(ValueError, match=r"the checkpoint holds a packed module \(w: int8 channel\)"):
        two.load_state_dict(one.state_dict())


def test_load_from_checkpoint_of_a_float_model(trained: Classifier, tmp_path: Path) -> None:
    host = trainer()
    host.validate(trained, datamodule=Digits(), verbose=False)
    host.save_checkpoint(tmp_path / "float.ckpt")
    again = lq.load_from_checkpoint(Classifier, tmp_path / "float.ckpt", lr=7.0)
    assert again.hparams.lr == 7.0
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in trained.state_dict().items())
    (tmp_path / "other").write_bytes(b"")
    torch.save([1], tmp_path / "other")
    with pytest.raises(ValueError, match="no Lightning checkpoint"):
        lq.load_from_checkpoint(Classifier, tmp_path / "other")
