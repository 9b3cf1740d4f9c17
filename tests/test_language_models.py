"""Small transformers models with random weights: what a language model's user does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_quant as lq
from lightning_quant.surgery import fake_modules, packed_modules
from tests.digits import trainer

transformers = pytest.importorskip("transformers")

VOCABULARY = 60


def gpt2(**options: Any) -> nn.Module:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=48, n_layer=2, n_head=4, **options)
    return transformers.GPT2LMHeadModel(config)


def llama(**options: Any) -> nn.Module:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **{**sizes, **options})
    return transformers.LlamaForCausalLM(config)


MODELS = {"gpt2": gpt2, "llama": llama, "llama-tied": lambda: llama(tie_word_embeddings=True)}


def tokens(count: int = 4) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(0))


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens(), "attention_mask": torch.ones(4, 12, dtype=torch.long)}]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w8a16", "w4a16", "w4a4", "nf4", "fp8"])
def test_quantize_save_and_reload(make: Any, recipe: str, tmp_path: Path) -> None:
    model = make().eval()
    qmodel = lq.quantize(model, recipe, batches())
    assert not any("lm_head" in name or "wte" in name or "embed" in name for name in packed_modules(qmodel))
    assert "unless a pattern of the recipe names it" in str(lq.summary(qmodel).skipped["lm_head"])
    with torch.no_grad():
        want, got = model(tokens()).logits, qmodel(tokens()).logits
    assert (got - want).norm() / want.norm() < (0.5 if recipe == "w4a4" else 0.2)
    lq.save_quantized(qmodel, tmp_path)
    again = lq.load_quantized(make(), tmp_path)
    assert torch.equal(again(tokens()).logits, got)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert again.generate(tokens(1), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 15)


def test_every_linear_of_gpt2_is_quantized() -> None:
    names = list(packed_modules(lq.quantize(gpt2(), "w8a16")))
    assert names == [
        f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_named_head_and_embedding_are_quantized_and_stay_tied() -> None:
    recipe = lq.Recipe("w8a16", schemes={"lm_head": "w8a16", "*.embed_tokens": "w8a16"})
    qmodel = lq.quantize(llama(tie_word_embeddings=True), recipe)
    assert qmodel.lm_head.weight_packed is qmodel.model.embed_tokens.weight_packed
    alone = lq.quantize(llama(tie_word_embeddings=True), lq.Recipe("w8a16", schemes={"lm_head": "w8a16"}))
    assert "also read by 'model.embed_tokens'" in str(lq.summary(alone))
    assert type(alone.model.embed_tokens) is nn.Embedding


class Causal(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(lq.param_groups(self, lr=1e-3, weight_decay=0.1), lr=1e-3)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w4a8-dynamic", "w4a16", "w4a4"])
@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_qat(make: Any, recipe: str, method: str) -> None:
    model = Causal(make())
    host = trainer(2, lq.QATCallback(recipe, method=method))
    host.fit(model, DataLoader(tokens(8), 4))
    qmodel = host.quantize()
    with torch.no_grad():
        want = model.eval().net(tokens()).logits
        got = qmodel.net(tokens()).logits
    # a sum of integers differs from one of floats in the last bit, which moves a value next to a tie to the next code
    difference = (got - want).abs() / want.abs().max()
    assert difference.median() <= 1e-6
    assert difference.max() <= 2e-3
    assert len(fake_modules(model)) == len(packed_modules(qmodel)) > 7


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_bf16_training_and_calibration(precision: str, method: str) -> None:
    model = Causal(llama())
    host = trainer(1, lq.QATCallback("w8a8", method=method), precision=precision)
    host.fit(model, DataLoader(tokens(8), 4))
    for part in fake_modules(model).values():
        for _, quantizer in part.quantizers():
            assert quantizer.scale.dtype == torch.float32
    qmodel = host.quantize()
    assert {part.weight_scale.dtype for part in packed_modules(qmodel).values()} == {torch.float32}
    assert torch.isfinite(qmodel.net(tokens()).logits).all()
    calibrated = trainer(precision=precision).quantize(Causal(llama()), dataloaders=DataLoader(tokens(8), 4), recipe="w8a8")
    assert torch.isfinite(calibrated.net(tokens()).logits).all()
