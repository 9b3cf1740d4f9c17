"""Folders that plain transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_quant as lq
from lightning_quant.surgery import packed_modules
from tests.lora_cases import llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

RECIPES: dict[str, Any] = {
    "w8a16": "w8a16",
    "w4a16": lq.Recipe("w4a16", group_size=32),
    "w4a16-channel": lq.Recipe("w4a16", granularity="channel"),
    "w4a16-asym": lq.Recipe("w4a16", group_size=32, symmetric=False),
    "w3a16": "w3a16",
    "w2a16": "w2a16",
    "w8a8-dynamic": "w8a8-dynamic",
    "fp8": "fp8",
    "mixed": lq.Recipe("w4a16", group_size=32, schemes={"*.down_proj": "w8a16"}, ignore=["*.0.self_attn.*"]),
}
IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def packed(recipe: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return lq.quantize(llama(**options).eval(), recipe)


@pytest.fixture(autouse=True)
def the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides multiply with torch's float operator, so that equal weights give equal bits."""
    monkeypatch.setenv("LQ_BACKEND", "reference")


@pytest.mark.parametrize("name", RECIPES)
def test_transformers_loads_it_with_equal_logits(tmp_path: Path, name: str) -> None:
    model = packed(RECIPES[name])
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        lq.save_quantized(model, tmp_path)
        again, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        logits = again(input_ids=IDS).logits
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    if name in ("w8a8-dynamic", "fp8"):  # its range of a token is absmax / 127.5, ours / 127
        assert (logits - wanted).abs().max() < 0.02 * wanted.abs().max()
    else:
        assert torch.equal(logits, wanted)


@pytest.mark.parametrize("name", RECIPES)
def test_and_so_does_this_package(tmp_path: Path, name: str) -> None:
    model = packed(RECIPES[name])
    lq.save_quantized(model, tmp_path)
    again = lq.load_quantized(llama(), tmp_path)
    state, found = model.state_dict(), again.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in state.items())
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert "lm_head" in config["ignore"]
    assert len(config["config_groups"]) == (2 if name == "mixed" else 1)


def test_files_of_an_earlier_save_are_replaced(tmp_path: Path) -> None:
    for recipe in ("w3a16", "w8a16"):
        lq.save_quantized(packed(recipe), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert not list(tmp_path.glob(".*"))


def test_tied_embeddings(tmp_path: Path) -> None:
    model = packed("w8a16", tie_word_embeddings=True)
    lq.save_quantized(model, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("nf4", "has nf4 weights"),
        (lq.Recipe("w4a16", group_size=48), "has 64 inputs, no multiple of its group size 48"),
        (lq.Recipe("w4a8-dynamic", group_size=32), "weights with quantized activations"),
    ],
    ids=["nf4", "ragged", "w4a8-dynamic"],
)
def test_what_it_cannot_hold_is_said_and_saved_for_us(tmp_path: Path, recipe: Any, reason: str) -> None:
    model = packed(recipe)
    with pytest.warns(UserWarning, match=f"only lq.load_quantized can read.*{reason}"):
        lq.save_quantized(model, tmp_path)
    assert not (tmp_path / "config.json").exists()
    again = lq.load_quantized(llama(), tmp_path)
    assert len(packed_modules(again)) == 14
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
