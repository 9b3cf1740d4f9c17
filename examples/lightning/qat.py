"""Quantization-aware training, the packed model, and its accuracy after a reload.

python examples/lightning/qat.py [--epochs 6] [--recipe w4a4] [--limit 1297] [--output DIR]
"""

from __future__ import annotations

import argparse
import tempfile

import lightning as L
from digits_net import DigitsData, DigitsNet

import lightning_quant as lq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--recipe", default="w4a4")
    parser.add_argument("--limit", type=int, default=1297, help="digits to train on")
    parser.add_argument("--output", help="where to save the packed model (default: a temporary folder)")
    options = parser.parse_args()

    L.seed_everything(0, verbose=False)
    data = DigitsData(limit=options.limit)
    callback = lq.QATCallback(options.recipe, method="lsq", freeze_bn_at=0.8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = lq.Trainer(max_epochs=options.epochs, callbacks=[callback], accelerator="cpu", **quiet)
    trainer.fit(DigitsNet(), datamodule=data)
    qmodel = trainer.quantize()
    print(lq.summary(qmodel))

    with tempfile.TemporaryDirectory() as temporary:
        folder = lq.save_quantized(qmodel, options.output or temporary)
        again = lq.load_quantized(DigitsNet(), folder)
    packed, reloaded = (trainer.validate(model, datamodule=data, verbose=False)[0]["accuracy"] for model in (qmodel, again))
    print(f"accuracy packed {100 * packed:.1f} %, reloaded {100 * reloaded:.1f} %")


if __name__ == "__main__":
    main()
