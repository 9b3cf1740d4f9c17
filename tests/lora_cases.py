"""Small models to fine-tune on a packed base, and one cell of the matrix: a mode, a model, a start; in one process or two."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_quant as lq
from lightning_quant.adapters import fingerprint
from lightning_quant.surgery import packed_modules

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
MODES = ("nf4", "fp4", "int8", "int4", "fp8")
VOCABULARY = 53


class Plain(L.LightningModule):
    """No transformers model inside."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(48, 96), nn.LayerNorm(96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU())
        self.head = nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 2e-2)

    @staticmethod
    def data() -> DataLoader:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(32, 48, generator=generator)
        return DataLoader(list(zip(x, (x[:, :4] * 3).argmax(1))), batch_size=4)


def llama(**options: Any) -> LlamaForCausalLM:
    config = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **options}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **config))


class Causal(L.LightningModule):
    """A transformers model inside."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = llama(**options)

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(input_ids=ids).logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(input_ids=batch, labels=batch).loss
        self.log("loss", loss, sync_dist=True)
        return loss

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 2e-2)

    @staticmethod
    def data() -> DataLoader:
        generator = torch.Generator().manual_seed(1)
        return DataLoader(torch.randint(0, VOCABULARY, (4, 12), generator=generator).repeat(8, 1), batch_size=4)


KINDS: dict[str, type[Any]] = {"plain": Plain, "transformers": Causal}
STARTS = ("fresh", "checkpoint")


def trainer(folder: Path, mode: str, epochs: int, *, r: int = 4, plugin: dict[str, Any] | None = None, **options: Any) -> L.Trainer:
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    callbacks = [lq.LoRACallback(r=r, adapter_dir=str(folder / "adapter")), saved]
    return L.Trainer(
        max_epochs=epochs,
        plugins=[lq.QuantPrecision(mode, **(plugin or {}))],
        callbacks=callbacks,
        default_root_dir=folder,
        **{**QUIET, **options},
    )


def adapter(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}


def run_cell(folder: Path, mode: str, kind: str, start: str, **options: Any) -> dict[str, Any]:
    """Fit for two epochs; or, from a checkpoint of the first, the second one in a new module."""
    model = KINDS[kind]()
    fit = trainer(folder, mode, 2, **options)
    fit.fit(model, KINDS[kind].data())
    first = adapter(model)
    if start == "checkpoint":
        model = KINDS[kind]()
        fit = trainer(folder, mode, 2, **options)
        fit.fit(model, KINDS[kind].data(), ckpt_path=str(folder / "epoch=0.ckpt"))
    packed = packed_modules(model)
    return {
        "adapter": adapter(model),
        "uninterrupted": first,
        "base": fingerprint(model),
        "loss": float(fit.callback_metrics["loss"]),
        "layers": {name: part.scheme.weight.label for name, part in packed.items()},
        "trained": [name for name, value in model.named_parameters() if value.requires_grad],
        "files": sorted(path.name for path in folder.iterdir()),
    }


def main(folder: Path) -> None:
    """What each of two processes does."""
    found: dict[Any, Any] = {}
    rank = 0
    for mode in MODES:
        for kind in KINDS:
            for start in STARTS:
                place = folder / f"{mode}-{kind}-{start}"
                place.mkdir(exist_ok=True)
                found[mode, kind, start] = run_cell(place, mode, kind, start, strategy="ddp", devices=2)
                rank = torch.distributed.get_rank()
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
