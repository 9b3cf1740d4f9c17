"""The QLoRA example and its config, on a tiny model that is made here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_quant.cli import main
from tests.examples.test_examples import EXAMPLES, load
from tests.lora_cases import llama

TEXT = "it was the best of times , it was the worst of times , it was the age of wisdom , it was the age of foolishness . "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and a tokenizer of letters, and a text."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    letters = {chr(code): code - 32 for code in range(32, 127)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({**letters, "[UNK]": 95, "[EOS]": 96}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[EOS]", unk_token="[UNK]").save_pretrained(
        tmp_path / "m"
    )
    torch.manual_seed(0)
    llama(vocab_size=97).save_pretrained(tmp_path / "m")
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "valid.txt").write_text(TEXT * 900)
    return tmp_path


def test_the_script_prints_each_stage(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    args = ["--data", str(folder), "--model", str(folder / "m"), "--steps", "24", "--rate", "0.01", "--windows", "4"]
    load("qlora").main([*args, "--length", "64", "--train-length", "32", "--out", str(folder / "out")])
    out = capsys.readouterr().out
    rows = {name.strip(): float(value) for name, value in re.findall(r"^(\S.{30})\s+([\d.]+)$", out, re.M)}
    assert list(rows) == ["float", "nf4", "nf4, 24 steps of LoRA", "merged in float32", "merged, nf4 again"]
    assert rows["nf4, 24 steps of LoRA"] < 0.8 * rows["nf4"]
    assert rows["merged in float32"] == pytest.approx(rows["nf4, 24 steps of LoRA"], rel=0.02)
    assert (folder / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert (folder / "out" / "merged" / "config.json").exists()


def test_the_config_runs_from_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.chdir(folder)
    model, text = str(folder / "m"), str(folder / "wikitext-2" / "valid.txt")
    given: dict[str, Any] = {
        "model.init_args.model": model,
        "data.init_args.tokenizer": model,
        "data.init_args.train": text,
        "data.init_args.validation": text,
        "data.init_args.train_range": "[0, 4096]",
        "data.init_args.validation_range": "[0, 512]",
        "trainer.max_steps": 4,
        "trainer.enable_progress_bar": "false",
    }
    main(["fit", "--config", str(EXAMPLES / "qlora.yaml"), *(f"--{name}={value}" for name, value in given.items())])
    assert (folder / "adapter" / "adapter_config.json").exists()
    state = torch.load(folder / "checkpoints" / "qlora" / "last.ckpt", weights_only=True)["state_dict"]
    assert any("lora_A" in name for name in state)
    assert not any(name.endswith("weight_packed") for name in state)
