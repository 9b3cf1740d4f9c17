"""A fit that stops half-way and is resumed from its checkpoint ends with the same bits as one that ran through.

python examples/lightning/resume.py [--epochs 4] [--stop-after 2] [--limit 1297]
"""

from __future__ import annotations

import argparse
import tempfile

import lightning as L
import torch
from digits_net import DigitsData, DigitsNet
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_quant as lq


class StopAfter(L.Callback):
    """Ends the fit after some epochs, as a machine that is taken away would."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def fit(epochs: int, limit: int, folder: str, *callbacks: L.Callback, ckpt_path: str | None = None) -> DigitsNet:
    L.seed_everything(0, verbose=False)
    model = DigitsNet()
    trainer = lq.Trainer(
        max_epochs=epochs,
        callbacks=[
            lq.QATCallback("w4a4", method="lsq", freeze_observers_at=0.5, freeze_bn_at=0.75),
            ModelCheckpoint(folder, save_last=True),
            *callbacks,
        ],
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=DigitsData(limit=limit), ckpt_path=ckpt_path)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--stop-after", type=int, default=2)
    parser.add_argument("--limit", type=int, default=1297, help="digits to train on")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
        through = fit(options.epochs, options.limit, whole)
        stopped = fit(options.epochs, options.limit, parts, StopAfter(options.stop_after))
        resumed = fit(options.epochs, options.limit, parts, ckpt_path=f"{parts}/last.ckpt")
    expected = through.state_dict()
    for name, model in (("stopped", stopped), ("resumed", resumed)):
        same = [torch.equal(value, expected[key]) for key, value in model.state_dict().items()]
        print(f"{name}: {sum(same)} of {len(same)} tensors equal those of the uninterrupted fit")


if __name__ == "__main__":
    main()
