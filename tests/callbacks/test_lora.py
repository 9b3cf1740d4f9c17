"""Adapters on a packed base, through Lightning: every mode, model, start and number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_quant as lq
from lightning_quant.adapters import BASE_KEY, fingerprint
from lightning_quant.nn import PackedModule
from lightning_quant.surgery import is_packed, packed_modules
from tests.helpers import assert_close
from tests.launching import launch
from tests.lora_cases import KINDS, MODES, QUIET, STARTS, Causal, Plain, adapter, run_cell, trainer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("lora")
every_mode = pytest.mark.parametrize("mode", MODES)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_start = pytest.mark.parametrize("start", STARTS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return launch("tests.lora_cases", tmp_path_factory.mktemp("lora-ddp"))


def check(found: dict[str, Any], kind: str) -> None:
    assert len(found["layers"]) == (14 if kind == "transformers" else 3)
    assert found["trained"]
    assert all("lora_" in name for name in found["trained"])
    assert found["adapter"].keys() == found["uninterrupted"].keys()
    assert all(torch.equal(value, found["uninterrupted"][name]) for name, value in found["adapter"].items())
    assert any(value.abs().max() > 0 for name, value in found["adapter"].items() if "lora_B" in name)
    assert found["loss"] < (3.9 if kind == "transformers" else 1.3)
    assert {"adapter", "epoch=0.ckpt", "epoch=1.ckpt"} <= set(found["files"])


@every_mode
@every_kind
@every_start
def test_one_process(tmp_path: Path, mode: str, kind: str, start: str) -> None:
    check(run_cell(tmp_path, mode, kind, start), kind)


@every_mode
@every_kind
@every_start
def test_two_processes(ranks: list[dict[Any, Any]], mode: str, kind: str, start: str) -> None:
    one, two = (rank[mode, kind, start] for rank in ranks)
    check(one, kind)
    assert one["base"] == two["base"]
    assert all(torch.equal(value, two["adapter"][name]) for name, value in one["adapter"].items())


def test_checkpoints_hold_no_byte_of_the_base(tmp_path: Path) -> None:
    model = Causal()
    trainer(tmp_path, "nf4", 1).fit(model, Causal.data())
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name or name == BASE_KEY for name in state)
    assert len(state) == 2 * 14 + 1
    before = fingerprint(model)
    model.load_state_dict(state)  # strictly
    assert fingerprint(model) == before
    assert before == fingerprint(Packed.of(Causal()))


class Packed:
    @staticmethod
    def of(model: L.LightningModule, mode: str = "nf4") -> L.LightningModule:
        return lq.QuantPrecision(mode).convert_module(model)  # type: ignore[return-value]


def test_another_base_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, "nf4", 1).fit(Causal(), Causal.data())
    checkpoint = str(tmp_path / "epoch=0.ckpt")
    for mode, seed in (("nf4", 1), ("int8", 0), ("fp4", 0)):
        with pytest.raises(ValueError, match="trained on another base: its weights have SHA-256"):
            trainer(tmp_path, mode, 2).fit(Causal(seed), Causal.data(), ckpt_path=checkpoint)
    trainer(tmp_path, "nf4", 2).fit(Causal(), Causal.data(), ckpt_path=checkpoint)


def test_weights_only_checkpoints_are_adapters_too(tmp_path: Path) -> None:
    model = Plain()
    saved = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    callbacks = [lq.LoRACallback(r=2, adapter_dir=str(tmp_path / "a")), saved]
    L.Trainer(max_epochs=1, plugins=[lq.QuantPrecision()], callbacks=callbacks, **QUIET).fit(model, Plain.data())
    state = torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"]
    assert not any(name.endswith(("weight_packed", "weight_scale", ".bias")) for name in state)


def test_save_all_keeps_the_base(tmp_path: Path) -> None:
    model = Plain()
    callbacks = [lq.LoRACallback(r=2, save="all", adapter_dir=str(tmp_path / "a")), ModelCheckpoint(tmp_path, filename="all")]
    L.Trainer(max_epochs=1, plugins=[lq.QuantPrecision()], callbacks=callbacks, **QUIET).fit(model, Plain.data())
    state = torch.load(tmp_path / "all.ckpt", weights_only=True)["state_dict"]
    assert "net.0.base_layer.weight_packed" in state
    other, here = Plain(seed=5), {**QUIET, "default_root_dir": tmp_path}
    resumed = L.Trainer(max_epochs=2, plugins=[lq.QuantPrecision()], callbacks=[lq.LoRACallback(r=2, save="all")], **here)
    resumed.validate(other, Plain.data(), ckpt_path=str(tmp_path / "all.ckpt"), verbose=False)
    assert fingerprint(other) == fingerprint(model)


@every_kind
def test_the_folder_loads_in_peft(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    model = KINDS[kind]()
    trainer(tmp_path, "nf4", 1, plugin={"compute_dtype": "fp32"}).fit(model, KINDS[kind].data())
    base = Packed.of(KINDS[kind]())
    root = base.net if kind == "transformers" else base
    again = peft.PeftModel.from_pretrained(root, tmp_path / "adapter").eval()
    batch = next(iter(KINDS[kind].data()))
    x = batch if kind == "transformers" else batch[0]
    model.eval()
    with torch.no_grad():
        wanted = model(x)
        got = again(input_ids=x).logits if kind == "transformers" else again(x)
        without = KINDS[kind]().eval()(x)
    assert (got - wanted).abs().max() <= 1e-4
    assert (got - without).abs().max() > 1e-2


def test_target_modules(tmp_path: Path) -> None:
    def names(**options: Any) -> list[str]:
        model = Causal()
        L.Trainer(plugins=[lq.QuantPrecision()], callbacks=[lq.LoRACallback(r=2, **options)], **QUIET).validate(
            model, Causal.data(), verbose=False
        )
        return sorted({name.partition(".lora_")[0] for name, value in model.named_parameters() if value.requires_grad})

    attention = [f"net.model.layers.{index}.self_attn.{name}" for index in (0, 1) for name in ("q_proj", "v_proj")]
    assert names(target_modules=["q_proj", "v_proj"]) == attention
    assert names(target_modules=r"model\.layers\.1\.mlp\..*_proj") == [
        f"net.model.layers.1.mlp.{name}" for name in ("down_proj", "gate_proj", "up_proj")
    ]
    assert len(names()) == 14
    with pytest.raises(
        MisconfigurationException, match=r"target_modules=\['query'\] names no layer.*model.layers.0.self_attn.q_proj"
    ):
        names(target_modules=["query"])


def test_modules_to_save_are_trained_whole(tmp_path: Path) -> None:
    class Model(Plain):
        pass

    model, start = Model(), Model()
    callback = lq.LoRACallback(r=2, target_modules=["net.0"], modules_to_save=["head"], adapter_dir=str(tmp_path / "adapter"))
    plugin = lq.QuantPrecision("nf4", ignore=["head"])
    L.Trainer(max_epochs=1, plugins=[plugin], callbacks=[callback], enable_checkpointing=False, **QUIET).fit(model, Plain.data())
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        f"head.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    merged = lq.merge_adapter(model).model
    assert not torch.equal(merged.head.weight, start.head.weight)
    refused = lq.LoRACallback(r=2, target_modules=["net.0"], modules_to_save=["head"])
    with pytest.raises(MisconfigurationException, match=r"modules_to_save: head is packed.*ignore=\['head'\]"):
        L.Trainer(plugins=[lq.QuantPrecision("nf4")], callbacks=[refused], **QUIET).validate(Plain(), Plain.data())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_variants_of_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    model = Plain()
    callback = lq.LoRACallback(r=2, options=options, adapter_dir=str(tmp_path / "adapter"))
    L.Trainer(max_epochs=2, plugins=[lq.QuantPrecision()], callbacks=[callback], enable_checkpointing=False, **QUIET).fit(
        model, Plain.data()
    )
    merged = lq.merge_adapter(model).model
    x = torch.randn(5, 48)
    assert_close(merged(x), model.eval()(x), 1e-4)


def test_loftq_starts_closer_to_the_float_model() -> None:
    x = torch.randint(0, 50, (4, 12))
    wanted = Causal().eval()(x).detach()

    def error(init: str) -> float:
        model = Causal()
        fit = L.Trainer(
            plugins=[lq.QuantPrecision("nf4", compute_dtype="fp32")], callbacks=[lq.LoRACallback(r=16, init=init)], **QUIET
        )
        fit.validate(model, Causal.data(), verbose=False)
        assert all(isinstance(part, PackedModule) for part in packed_modules(model).values())
        return (model.eval()(x) - wanted).norm().item()

    assert error("loftq") < 0.85 * error("default")
    with pytest.raises(MisconfigurationException, match="starts from float weights, and the model is packed already"):
        L.Trainer(plugins=[lq.QuantPrecision()], callbacks=[lq.LoRACallback(init="loftq")], **QUIET).validate(
            Packed.of(Causal()), Causal.data()
        )
    with pytest.raises(MisconfigurationException, match="nothing is packed"):
        L.Trainer(callbacks=[lq.LoRACallback(init="loftq")], **QUIET).validate(Causal(), Causal.data())
    with pytest.raises(MisconfigurationException, match="init='pissa' changes the base's weights"):
        L.Trainer(plugins=[lq.QuantPrecision()], callbacks=[lq.LoRACallback(init="pissa")], **QUIET).validate(
            Causal(), Causal.data()
        )


def test_a_float_base_takes_adapters_too(tmp_path: Path) -> None:
    model = Causal()
    callbacks = [lq.LoRACallback(r=2, init="pissa", adapter_dir=str(tmp_path / "a")), ModelCheckpoint(tmp_path, filename="x")]
    L.Trainer(max_epochs=1, callbacks=callbacks, **QUIET).fit(model, Causal.data())
    assert not is_packed(model)
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name or name == BASE_KEY for name in state)


def test_gradient_checkpointing_computes_the_same(tmp_path: Path) -> None:
    found = {}
    for flag in (False, True):
        model = Causal()
        callback = lq.LoRACallback(r=2, gradient_checkpointing=flag, adapter_dir=str(tmp_path / "a"))
        L.seed_everything(3, verbose=False)
        L.Trainer(max_epochs=1, plugins=[lq.QuantPrecision()], callbacks=[callback], enable_checkpointing=False, **QUIET).fit(
            model, Causal.data()
        )
        found[flag] = adapter(model)
        assert model.net.is_gradient_checkpointing == flag
    assert_close(list(found[True].values()), list(found[False].values()), 1e-4)
    with pytest.raises(MisconfigurationException, match="gradient_checkpointing=True: Plain is no transformers model"):
        L.Trainer(callbacks=[lq.LoRACallback(gradient_checkpointing=True)], **QUIET).validate(Plain(), Plain.data())


def test_quantized_training_of_base_and_adapter(tmp_path: Path) -> None:
    """QATCallback and LoRACallback: what is rounded is the sum, so that the merged model is on its grid."""
    model = Plain()
    callbacks = [lq.QATCallback("w4a16"), lq.LoRACallback(r=4, adapter_dir=str(tmp_path / "a"))]
    L.Trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=False, **QUIET).fit(model, Plain.data())
    assert all("lora_" in name for name, value in model.named_parameters() if value.requires_grad)
    x = torch.randn(6, 48)
    wanted = model.eval()(x)
    merged = lq.merge_adapter(model)
    assert not any("lora_" in name for name, _ in merged.model.named_parameters())
    packed = lq.convert(merged.model)
    assert type(packed.net[0]).__name__ == "PackedLinear"
    assert_close(packed(x), wanted, 1e-5)
    assert all(row.change > 1e-3 for row in merged.rows)
    refused = (
        ([lq.QATCallback("w4a16"), lq.LoRACallback(r=4, dropout=0.1)], "dropout=0"),
        ([lq.LoRACallback(r=4), lq.QATCallback("w4a16")], "list QATCallback before LoRACallback"),
    )
    for callbacks, message in refused:
        fit = L.Trainer(max_epochs=1, callbacks=callbacks, **QUIET)
        with pytest.raises(MisconfigurationException, match=message):
            fit.fit(Plain(), Plain.data())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 2.5}, "r=2.5"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"alpha": -1}, "alpha=-1"),
        ({"save": "base"}, "save='base': valid are adapter, all"),
        ({"options": {"r": 3}}, "options: r has an argument of its own"),
        ({"options": {"rank": 3}}, "LoraConfig has no rank; it has .*use_dora"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        lq.LoRACallback(**options)


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    model = Plain()
    trainer(tmp_path, "int8", 1).fit(model, Plain.data())
    first = adapter(model)
    trainer(tmp_path, "int8", 1).fit(model, Plain.data())
    assert any(not torch.equal(value, first[name]) for name, value in adapter(model).items())
    with pytest.raises(MisconfigurationException, match=r"has an adapter of .*'r': 4"):
        trainer(tmp_path, "int8", 1, r=8).fit(model, Plain.data())


def test_configure_model(tmp_path: Path) -> None:
    class Late(Causal):
        def __init__(self) -> None:
            L.LightningModule.__init__(self)
            self.net: nn.Module | None = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = Causal().net

    model = Late()
    trainer(tmp_path, "nf4", 2).fit(model, Causal.data())
    again = Late()
    # layers that were packed as they were made have the weights they were made with
    trainer(tmp_path, "nf4", 2).validate(again, Causal.data(), ckpt_path=str(tmp_path / "epoch=1.ckpt"), verbose=False)
    assert all(torch.equal(value, adapter(again)[name]) for name, value in adapter(model).items())
    assert len(packed_modules(model)) == 14


def test_an_adapter_folder_of_something_else_is_kept(tmp_path: Path) -> None:
    model = Plain()
    trainer(tmp_path, "nf4", 1).fit(model, Plain.data())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds something else than an adapter"):
        lq.save_adapter(model, tmp_path / "other")
    callback = lq.LoRACallback(r=4, adapter_dir=str(tmp_path / "other"))
    fit = L.Trainer(max_epochs=1, plugins=[lq.QuantPrecision()], callbacks=[callback], enable_checkpointing=False, **QUIET)
    with pytest.warns(UserWarning, match="the adapter was not written.*lq.save_adapter"):  # the fit itself ends well
        fit.fit(model, Plain.data())
    lq.save_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(ValueError, match="has no adapter: train it with LoRACallback"):
        lq.save_adapter(Plain(), tmp_path / "x")


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    model = Plain()
    trainer(tmp_path, "nf4", 1).fit(model, Plain.data())
    with pytest.raises(ValueError, match=r"has an adapter: merge it first, lq.merge_adapter"):
        lq.quantize(model, "w8a16")
    with pytest.raises(ValueError, match="holds an adapter without its base"):
        lq.load_from_checkpoint(Plain, tmp_path / "epoch=0.ckpt")
    merged = lq.merge_adapter(model).model
    assert is_packed(lq.quantize(merged, "w8a16"))
    callback = lq.LoRACallback()
    fit = L.Trainer(max_epochs=1, strategy="ddp_spawn", devices=2, callbacks=[callback], **QUIET)
    with pytest.raises(MisconfigurationException, match=r"LoRACallback: 'spawn' processes give back weights only.*strategy='ddp'"):
        callback.setup(fit, Plain(), "fit")
