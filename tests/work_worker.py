"""Quantizes a tiny Llama in a process that may kill itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant import work

BLOCKS = 7


def llama(blocks: int = BLOCKS, seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=blocks, max_position_embeddings=64, **sizes)).eval()


def batches(count: int = 6, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 50, (4, 16), generator=generator)} for _ in range(count)]


def recipe(name: str) -> lq.Recipe:
    weights: dict[str, Any] = {"group_size": 16, "symmetric": False}
    return {
        "gptq": lambda: lq.Recipe("w4a16", algorithms=["gptq"], **weights),
        "awq+gptq": lambda: lq.Recipe("w3a16", algorithms=["awq", "gptq"], group_size=16),
        "autoround": lambda: lq.Recipe(
            "w4a16", algorithms=["autoround"], algorithm_options={"autoround": {"iterations": 6, "batches": 2}}, **weights
        ),
        "block_ap": lambda: lq.Recipe(
            "w2a16", algorithms=["block_ap"], algorithm_options={"block_ap": {"iterations": 6, "batches": 2}}, **weights
        ),
        "adaround-head": lambda: lq.Recipe(
            "w4a16",
            schemes={"lm_head": "w8a16"},
            algorithms=["adaround"],
            algorithm_options={"adaround": {"iterations": 6, "batches": 2}},
            **weights,
        ),
        "smoothquant": lambda: lq.Recipe("w8a8", algorithms=["smoothquant"]),
        "static-gptq": lambda: lq.Recipe("w4a4", edges=None, algorithms=["gptq"]),
    }[name]()


def quantize(name: str, folder: Path | None, **options: Any) -> nn.Module:
    return lq.quantize(llama(), recipe(name), batches(), work_dir=folder, **options)


def result(model: nn.Module) -> dict[str, Any]:
    return {"state": model.state_dict(), "summary": str(lq.summary(model))}


def die_after(count: int) -> None:
    """SIGKILL once `count` units are written and a half of the next one is."""
    write, done = work.save_file, [0]

    def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        write(tensors, path, metadata)
        if done[0] == count:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        done[0] += 1

    work.save_file = save_file


def main(name: str, folder: Path, out: Path, kill: int | None = None) -> None:
    """Save the packed model's state_dict and the summary to `out`, unless it dies in the middle of the file after `kill` units."""
    torch.set_num_threads(1)
    if kill is not None:
        die_after(kill)
    torch.save(result(quantize(name, folder)), out)
