"""Adapters merged into the base, and what storing the sum costs."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lightning_quant as lq
from lightning_quant.adapters import has_adapter
from lightning_quant.surgery import is_packed, packed_modules
from lightning_quant.unpacking import unpack_module
from tests.helpers import assert_close
from tests.lora_cases import KINDS, MODES, QUIET, Causal, Plain

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def tuned(kind: str, mode: str = "nf4", **options: Any) -> L.LightningModule:
    model = KINDS[kind]()
    callbacks = [lq.LoRACallback(**{"r": 4, "adapter_dir": "unused", **options})]
    trainer = L.Trainer(
        max_epochs=1, plugins=[lq.QuantPrecision(mode, compute_dtype="fp32")], callbacks=callbacks, fast_dev_run=6, **QUIET
    )
    trainer.fit(model, KINDS[kind].data())
    return model.eval()


def inputs(kind: str) -> torch.Tensor:
    return IDS if kind == "transformers" else torch.randn(5, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_what_was_trained(kind: str, mode: str) -> None:
    model = tuned(kind, mode)
    before = copy.deepcopy(model.state_dict())
    merged = lq.merge_adapter(model)
    with torch.no_grad():
        assert_close(merged.model(inputs(kind)), model(inputs(kind)), 1e-4)
    assert not is_packed(merged.model)
    assert not has_adapter(merged.model)
    assert merged.model.state_dict().keys() == KINDS[kind]().state_dict().keys()
    KINDS[kind]().load_state_dict(merged.model.state_dict())  # a float checkpoint like any other
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(row.change > 0 and row.errors["float32"] == 0 for row in merged.rows)
    label = next(iter(packed_modules(model).values())).scheme.weight.label
    assert all(0 < row.errors[label] < 0.2 for row in merged.rows)


def test_errors_are_those_of_the_weights() -> None:
    model = tuned("plain")
    merged = lq.merge_adapter(model)
    rough = lq.merge_adapter(model, dtype="bfloat16", recipe="int4")
    assert type(rough.model.net[0]).__name__ == "PackedLinear"
    for row in rough.rows:
        exact = merged.model.get_submodule(row.layer).weight.detach()
        error = (rough.model.get_submodule(row.layer).dequantized_weight() - exact).norm() / exact.norm()
        # the packed one was made from bfloat16
        assert row.errors["int4 group64"] == pytest.approx(error.item(), rel=0.1)
        assert row.errors["bfloat16"] == pytest.approx(((exact.bfloat16().float() - exact).norm() / exact.norm()).item(), rel=1e-3)
    lines = str(rough).splitlines()
    assert lines[0].split() == ["layer", "change", "bfloat16", "nf4", "group64", "int4", "group64"]
    assert lines[-1].startswith("mean")
    assert len(lines) == 2 + len(rough.rows) + 1


def test_dtype_of_the_result() -> None:
    merged = lq.merge_adapter(tuned("transformers"), dtype="bf16").model
    assert {value.dtype for value in merged.parameters()} == {torch.bfloat16}
    assert all(value.requires_grad for value in merged.parameters())


def test_transformers_saves_it(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    model = tuned("transformers")
    merged = lq.merge_adapter(model).model
    merged.net.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(again(input_ids=IDS).logits, model(IDS), 1e-4)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="this Plain has no adapter"):
        lq.merge_adapter(Plain())
    model = tuned("plain")
    with pytest.raises(ValueError, match="dtype='int8' is no floating dtype"):
        lq.merge_adapter(model, dtype="int8")
    with pytest.raises(ValueError, match="needs calibration data"):
        lq.merge_adapter(model, recipe="w8a8")
    packed = lq.quantize(nn.Sequential(nn.Linear(8, 8)), "w8a8-dynamic")
    with pytest.raises(ValueError, match="has no float equal"):
        unpack_module(packed[0], torch.float32)


@pytest.mark.parametrize("mode", ["w8a16", "nf4", "fp8"])
def test_unpacked_modules(mode: str) -> None:
    scheme = lq.QuantPrecision(mode if mode != "fp8" else "fp8").recipe.scheme
    layers = {"linear": (nn.Linear(64, 8), torch.randn(3, 64)), "conv": (nn.Conv2d(3, 8, 3), torch.randn(2, 3, 6, 6))}
    for module, x in layers.values():
        packed = lq.quantize(nn.Sequential(module), lq.Recipe(scheme))[0]
        plain = unpack_module(packed, torch.float32)
        assert type(plain) is type(module)
        assert_close(plain(x), packed(x), 1e-6)
        assert plain.state_dict().keys() == module.state_dict().keys()


def test_conv1d_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=53, n_positions=32, n_embd=64, n_layer=1, n_head=2)

    class Model(Causal):
        def __init__(self) -> None:
            L.LightningModule.__init__(self)
            self.net = transformers.GPT2LMHeadModel(config)

    model = Model()
    plugin, callback = lq.QuantPrecision("nf4", compute_dtype="fp32"), lq.LoRACallback(r=2)
    trainer = L.Trainer(max_epochs=1, plugins=[plugin], callbacks=[callback], fast_dev_run=3, **QUIET)
    trainer.fit(model, Causal.data())
    assert len(packed_modules(model)) == 4
    merged = lq.merge_adapter(model.eval())
    with torch.no_grad():
        assert_close(merged.model(IDS), model(IDS), 1e-4)
