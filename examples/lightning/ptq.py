"""Post-training quantization of a trained model with several recipes, each compared with the float model.

python examples/lightning/ptq.py [--epochs 4] [--recipes w8a8 w4a16] [--limit 1297]
"""

from __future__ import annotations

import argparse

import lightning as L
from digits_net import DigitsData, DigitsNet

import lightning_quant as lq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--recipes", nargs="+", default=["w8a8", "w4a16"])
    parser.add_argument("--limit", type=int, default=1297, help="digits to train on")
    options = parser.parse_args()

    L.seed_everything(0, verbose=False)
    model, data = DigitsNet(), DigitsData(limit=options.limit)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = lq.Trainer(max_epochs=options.epochs, accelerator="cpu", **quiet)
    trainer.fit(model, datamodule=data)
    for recipe in options.recipes:
        qmodel = trainer.quantize(model, datamodule=data, recipe=recipe, calibration_batches=8)
        print(f"\n{recipe}")
        lq.compare(model, qmodel, trainer=trainer, datamodule=data)


if __name__ == "__main__":
    main()
