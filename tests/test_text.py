"""Windows of text, and a causal language model around them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_quant as lq
from lightning_quant.surgery import packed_modules
from tests.lora_cases import QUIET, llama

TEXTS = ["the quick brown fox jumps over the lazy dog", "a stitch in time saves nine", "all that glitters is not gold"] * 6


class Letters:
    """A tokenizer of letters."""

    eos_token_id = 0

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        ids = [1 + ord(letter) % 32 for letter in text]
        return {"input_ids": torch.tensor([ids])} if options.get("return_tensors") else {"input_ids": ids}


def data(**options: Any) -> lq.TextDataModule:
    return lq.TextDataModule(Letters(), TEXTS, TEXTS[:3], **{"window": 16, "batch_size": 4, **options})


def test_documents_are_joined_and_cut() -> None:
    module = data()
    module.setup("fit")
    windows = torch.cat([batch["input_ids"] for batch in module.val_dataloader()])
    ids = [token for text in TEXTS[:3] for token in [*Letters()(text)["input_ids"], 0]][:-1]
    assert windows.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert windows.shape[1] == 16
    batch = next(iter(module.train_dataloader()))
    assert torch.equal(batch["input_ids"], batch["labels"])
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(torch.cat([batch["input_ids"] for batch in data().train_dataloader()]))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_sources(tmp_path: Path) -> None:
    for name, text in zip("ab", TEXTS):
        (tmp_path / f"{name}.txt").write_text(text)
    files = [str(tmp_path / "a.txt"), tmp_path / "b.txt"]

    class Table:
        column_names = ("text", "label")

        def __iter__(self) -> Any:
            return iter([{"text": text, "label": 0} for text in TEXTS[:2]])

    found = []
    for source in (files, TEXTS[:2], Table()):
        module = lq.TextDataModule(Letters(), validation=source, window=8)
        found.append(torch.cat([batch["input_ids"] for batch in module.val_dataloader()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    one = lq.TextDataModule(Letters(), validation=str(tmp_path / "a.txt"), window=8, validation_range=[8, 24])
    windows = torch.cat([batch["input_ids"] for batch in one.val_dataloader()])
    assert windows.flatten().tolist() == Letters()(TEXTS[0])["input_ids"][8:24]


def test_calibration_windows_are_spread_over_the_training_text() -> None:
    module = data(calibration_windows=5)
    every = [batch["input_ids"] for batch in torch.utils.data.DataLoader(module._windows("train"), batch_size=1)]
    chosen = torch.cat([batch["input_ids"] for batch in module.calibration_dataloader()])
    assert len(chosen) == 5
    assert torch.equal(chosen[0:1], every[0])
    assert torch.equal(chosen[-1:], every[4 * len(every) // 5])
    with pytest.raises(MisconfigurationException, match="has no train="):
        lq.TextDataModule(Letters()).calibration_dataloader()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="window=0"):
        data(window=0)
    with pytest.raises(
        MisconfigurationException, match=r"validation: 100 tokens are less than one window of 4096|less than one window"
    ):
        data(window=4096).val_dataloader()
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        lq.TextDataModule(Letters(), tmp_path / "no.txt").train_dataloader()
    with pytest.raises(FileNotFoundError, match="no config.json there"):
        lq.CausalLMModule(str(tmp_path))


def module(**options: Any) -> lq.CausalLMModule:
    torch.manual_seed(0)
    return lq.CausalLMModule(llama(), lr=1e-2, **options)


def test_perplexity_is_that_of_all_tokens() -> None:
    model, source = module(), data()
    (found,) = L.Trainer(**QUIET).validate(model, source, verbose=False)
    ids = torch.cat([batch["input_ids"] for batch in source.val_dataloader()])
    with torch.no_grad():
        logits = model.eval().model(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert found["val_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_training_brings_it_down_and_quantize_takes_the_same_data(tmp_path: Path) -> None:
    model, source = module(), data()
    trainer = lq.Trainer(max_epochs=4, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET)
    (before,) = trainer.validate(model, source, verbose=False)
    trainer.fit(model, source)
    (after,) = trainer.validate(model, source, verbose=False)
    assert after["val_perplexity"] < 0.5 * before["val_perplexity"]
    recipe = lq.Recipe("w4a16", group_size=32, algorithms=["gptq"])
    packed = trainer.quantize(model, datamodule=source, recipe=recipe)
    (last,) = trainer.validate(packed, source, verbose=False)
    assert last["val_perplexity"] < 1.2 * after["val_perplexity"]


def test_a_folder_is_packed_as_it_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "model")
    model = lq.CausalLMModule(str(tmp_path / "model"), lr=1e-2)
    callbacks = [lq.LoRACallback(r=4, adapter_dir=str(tmp_path / "adapter"))]
    trainer = lq.Trainer(max_epochs=2, plugins=[lq.QuantPrecision("nf4")], callbacks=callbacks, enable_checkpointing=False, **QUIET)
    trainer.fit(model, data())
    assert len(packed_modules(model)) == 14
    assert lq.summary(model).rows
    plain = lq.CausalLMModule(str(tmp_path / "model"))
    L.Trainer(**QUIET).validate(plain, data(), verbose=False)
    assert not packed_modules(plain)
    assert torch.equal(plain.model.lm_head.weight, model.model.lm_head.weight)


def test_generate() -> None:
    class Speaking(Letters):
        def __call__(self, text: str, **options: Any) -> Any:
            from transformers import BatchEncoding

            return BatchEncoding(super().__call__(text, **options))

        def decode(self, ids: torch.Tensor, **options: Any) -> str:
            return " ".join(map(str, ids.tolist()))

    text = module().generate("the quick", Speaking(), max_new_tokens=5)
    assert 1 <= len(text.split()) <= 5
