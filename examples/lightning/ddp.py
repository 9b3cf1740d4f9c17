"""QAT on two processes (gloo, on the CPU): fit, `trainer.quantize()`, save; rank 0 prints.

python examples/lightning/ddp.py [--epochs 2] [--devices 2] [--limit 1297] [--output packed]
"""

from __future__ import annotations

import argparse

import lightning as L
from digits_net import DigitsData, DigitsNet

import lightning_quant as lq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--limit", type=int, default=1297, help="digits to train on")
    parser.add_argument("--output", default="packed", help="where to save the packed model")
    options = parser.parse_args()

    L.seed_everything(0, verbose=False)
    data = DigitsData(limit=options.limit)
    trainer = lq.Trainer(
        max_epochs=options.epochs,
        callbacks=[lq.QATCallback("w8a8")],
        accelerator="cpu",
        strategy="ddp",
        devices=options.devices,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(DigitsNet(), datamodule=data)
    qmodel = trainer.quantize()
    folder = lq.save_quantized(qmodel, options.output)  # rank 0 writes, the others wait
    accuracy = trainer.validate(lq.load_quantized(DigitsNet(), folder), datamodule=data, verbose=False)[0]["accuracy"]
    if trainer.is_global_zero:
        print(lq.summary(qmodel))
        print(f"{trainer.world_size} processes, accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
