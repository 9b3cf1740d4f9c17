"""`QuantPrecision` in a Trainer: what it packs and when, in which precision it computes, and checkpoints both ways."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.surgery import is_packed, packed_modules
from tests.lora_cases import KINDS, MODES, QUIET, Causal, Plain, llama

every_mode = pytest.mark.parametrize("mode", MODES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def fitted(folder: Path, mode: Any = "nf4", kind: str = "plain", **options: Any) -> tuple[L.LightningModule, L.Trainer]:
    model = KINDS[kind]()
    saved = ModelCheckpoint(folder, filename="packed")
    fit = L.Trainer(max_epochs=1, plugins=[lq.QuantPrecision(mode, **options)], callbacks=[saved], default_root_dir=folder, **QUIET)
    fit.fit(model, KINDS[kind].data())
    return model, fit


@every_mode
@every_kind
def test_layers_are_packed_and_the_rest_is_trained(tmp_path: Path, mode: str, kind: str) -> None:
    before = KINDS[kind]()
    model, _ = fitted(tmp_path, mode, kind)
    packed = packed_modules(model)
    assert len(packed) == (14 if kind == "transformers" else 3)
    assert fingerprint_of_packed(model) == fingerprint_of_packed(lq.QuantPrecision(mode).convert_module(before))
    norm = "net.1" if kind == "plain" else "net.model.norm"
    assert not torch.equal(model.get_submodule(norm).weight, KINDS[kind]().get_submodule(norm).weight)
    if kind == "transformers":
        assert type(model.net.lm_head) is nn.Linear


def fingerprint_of_packed(model: nn.Module) -> list[int]:
    words = (value for name, value in model.named_parameters() if name.endswith("weight_packed"))
    return [int(value.long().sum()) for value in words]


@every_mode
@every_kind
def test_packed_checkpoint_into_a_float_module_and_back(tmp_path: Path, mode: str, kind: str) -> None:
    model, _ = fitted(tmp_path, mode, kind)
    other = KINDS[kind](seed=7)
    evaluation = lq.Trainer(plugins=[lq.QuantPrecision(mode)], default_root_dir=tmp_path, **QUIET)
    evaluation.validate(other, KINDS[kind].data(), ckpt_path=str(tmp_path / "packed.ckpt"), verbose=False)
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    # and a float one's into a packed module
    start = KINDS[kind](seed=3)
    packed = lq.QuantPrecision(mode).convert_module(KINDS[kind](seed=4))
    packed.load_state_dict(start.state_dict(), strict=True)
    wanted = lq.QuantPrecision(mode).convert_module(start)
    assert all(torch.equal(value, packed.state_dict()[name]) for name, value in wanted.state_dict().items())


def test_an_incompatible_checkpoint_raises(tmp_path: Path) -> None:
    fitted(tmp_path, "nf4")
    path = str(tmp_path / "packed.ckpt")
    for mode in ("int8", "fp4"):
        evaluation = lq.Trainer(plugins=[lq.QuantPrecision(mode)], enable_checkpointing=False, **QUIET)
        with pytest.raises((ValueError, RuntimeError), match="nf4|size mismatch"):
            evaluation.validate(Plain(), Plain.data(), ckpt_path=path, verbose=False)
    plain = L.Trainer(**QUIET)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_packed"):  # nothing packs it: loud, not the old weights
        plain.validate(Plain(), Plain.data(), ckpt_path=path, verbose=False)
    callback = L.Trainer(plugins=[lq.QuantPrecision("nf4")], callbacks=[lq.PackedBaseCallback()], **QUIET)
    callback.validate(Plain(), Plain.data(), ckpt_path=path, verbose=False)


def test_converting_twice_changes_nothing_and_another_mode_raises() -> None:
    plugin, model = lq.QuantPrecision("nf4"), Plain()
    plugin.convert_module(model)
    before = {name: id(value) for name, value in model.named_parameters()}
    assert plugin.convert_module(model) is model
    assert before == {name: id(value) for name, value in model.named_parameters()}
    with pytest.raises(MisconfigurationException, match="packed by another recipe already"):
        lq.QuantPrecision("int8").convert_module(model)
    with pytest.raises(MisconfigurationException, match="prepared for quantization-aware training"):
        plugin.convert_module(lq.prepare(Plain(), "w8a8-dynamic"))


@pytest.mark.parametrize(
    ("dtype", "wanted", "precision"),
    [("bf16", torch.bfloat16, "bf16-mixed"), ("fp16", torch.float16, "16-mixed"), ("fp32", torch.float32, "32-true")],
)
def test_compute_dtypes(tmp_path: Path, dtype: Any, wanted: torch.dtype, precision: str) -> None:
    seen: list[torch.dtype] = []

    class Watched(Plain):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.net(x)
            seen.append(hidden.dtype)
            return self.head(hidden)

    model = Watched()
    plugin = lq.QuantPrecision("nf4", compute_dtype=dtype)
    fit = L.Trainer(max_epochs=1, plugins=[plugin], enable_checkpointing=False, **QUIET)
    fit.fit(model, Plain.data())
    assert fit.precision == precision
    assert set(seen) == {wanted}
    assert (plugin.scaler is not None) == (dtype == "fp16")
    assert all(value.dtype == torch.float32 for name, value in model.named_parameters() if name.endswith(("_scale", "1.weight")))


def test_the_gradient_scaler_is_resumed(tmp_path: Path) -> None:
    fitted(tmp_path, "nf4", compute_dtype="fp16")
    state = torch.load(tmp_path / "packed.ckpt", weights_only=True)["QuantPrecision"]
    assert state["scale"] > 0
    plugin = lq.QuantPrecision("nf4", compute_dtype="fp16")
    state_before = dict(state, scale=1024.0)
    checkpoint = torch.load(tmp_path / "packed.ckpt", weights_only=True)
    torch.save({**checkpoint, "QuantPrecision": state_before}, tmp_path / "changed.ckpt")
    resumed = lq.Trainer(max_epochs=1, plugins=[plugin], enable_checkpointing=False, **QUIET)
    resumed.fit(Plain(), Plain.data(), ckpt_path=str(tmp_path / "changed.ckpt"))
    assert plugin.scaler.state_dict()["scale"] == 1024.0


def test_half_precision_norms_become_float32() -> None:
    model = Plain().to(torch.bfloat16)
    lq.QuantPrecision("nf4").convert_module(model)
    assert model.net[1].weight.dtype == torch.float32
    assert model.net[0].weight_scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("mode", "backend", "used"),
    [("nf4", "auto", "cpu"), ("nf4", "native", "native"), ("nf4", "bitsandbytes", "bitsandbytes"), ("int8", "auto", "cpu")],
)
def test_the_choice_of_the_backend_is_logged(caplog: Any, mode: str, backend: Any, used: str) -> None:
    pytest.importorskip("bitsandbytes")
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        lq.QuantPrecision(mode, backend=backend).convert_module(Causal())
    assert f"14 layers packed (w: {'nf4 group64' if mode == 'nf4' else 'int8 channel'})" in caplog.text
    assert f"backend {used}" in caplog.text
    assert "net.lm_head" in caplog.text


def test_backends_agree(tmp_path: Path) -> None:
    x = torch.randint(0, 50, (2, 9))
    outputs = []
    for backend in ("bitsandbytes", "native"):
        pytest.importorskip("bitsandbytes")
        model = lq.QuantPrecision("nf4", backend=backend).convert_module(Causal())
        outputs.append(model.eval()(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_bytes_a_weight() -> None:
    for double, bound in ((False, 0.57), (True, 0.53)):
        model = lq.QuantPrecision("nf4", double_quant=double).convert_module(Causal(hidden_size=256, intermediate_size=512))
        stored = numel = 0
        for packed in packed_modules(model).values():
            stored += sum(value.numel() * value.element_size() for name, value in packed.named_parameters() if name != "bias")
            numel += packed.in_features * packed.out_features
        assert stored / numel <= bound


def test_words_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    model, packed = Causal(), lq.QuantPrecision("nf4").convert_module(Causal())
    for name, part in packed_modules(packed).items():
        theirs, state = functional.quantize_4bit(model.get_submodule(name).weight.detach(), blocksize=64, quant_type="nf4")
        assert torch.equal(part.weight_packed.view(torch.uint8).flatten(), theirs.flatten())
        assert torch.equal(part.weight_scale, state.absmax)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "int3"}, "unknown recipe 'int3'.*As a base also: nf4, fp4, int8, int4, fp8"),
        ({"mode": "w8a8"}, "needs calibration data .static activations."),
        ({"mode": lq.Recipe("w4a16", algorithms=["gptq"])}, "needs calibration data .gptq."),
        ({"compute_dtype": "bf8"}, "compute_dtype='bf8': valid are bf16, fp16, fp32"),
        ({"backend": "cuda"}, "backend='cuda': valid are"),
        ({"mode": "int8", "backend": "bitsandbytes"}, "kernels for nf4 and fp4, not for mode='int8'"),
        ({"mode": "int4", "double_quant": True}, "double_quant=True: for nf4 and fp4"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        lq.QuantPrecision(**options)


def test_other_recipes(tmp_path: Path) -> None:
    model, _ = fitted(tmp_path, lq.Recipe("w8a8-dynamic", ignore=["head"]))
    assert sorted(packed_modules(model)) == ["net.0", "net.3"]
    assert model.net[0].scheme.input is not None


def test_nothing_to_pack() -> None:
    class Empty(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(MisconfigurationException, match="quantizes nothing"):
        lq.QuantPrecision().convert_module(Empty())


def test_layers_are_packed_as_they_are_made() -> None:
    plugin, seen = lq.QuantPrecision("nf4", ignore=["*.skip"]), []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)
            seen.append(type(self.fc).__name__)
            self.skip = nn.Linear(64, 64)
            seen.append(type(self.skip).__name__)

    with plugin.module_init_context():
        model = nn.Sequential(Block(), nn.Linear(64, 8))
    assert seen == ["PackedLinear", "Linear"]
    assert type(nn.Sequential(nn.Linear(4, 4))[0]) is nn.Linear  # outside nothing is packed
    plugin.convert_module(model)
    assert is_packed(model)
    assert type(model[0].skip) is nn.Linear
    assert lq.summary(model).rows
    with plugin.module_init_context():
        causal = llama()
    plugin.convert_module(causal)
    assert len(packed_modules(causal)) == 14
    assert causal(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_the_trainer_brings_the_callback_along() -> None:
    assert any(isinstance(each, lq.PackedBaseCallback) for each in lq.Trainer(plugins=[lq.QuantPrecision()], **QUIET).callbacks)
    assert not any(isinstance(each, lq.PackedBaseCallback) for each in lq.Trainer(**QUIET).callbacks)
    adapted = lq.Trainer(plugins=[lq.QuantPrecision()], callbacks=[lq.LoRACallback()], **QUIET)
    assert not any(isinstance(each, lq.PackedBaseCallback) for each in adapted.callbacks)
    with pytest.raises(MisconfigurationException, match="packs for QuantPrecision"):
        L.Trainer(callbacks=[lq.PackedBaseCallback()], **QUIET).validate(Plain(), Plain.data())
