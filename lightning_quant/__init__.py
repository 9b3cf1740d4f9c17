"""Quantization for PyTorch Lightning: QAT, PTQ and packed low-bit models, each one line in a Trainer."""

from lightning_quant.adapters import save_adapter
from lightning_quant.allocate import allocate
from lightning_quant.calibration_report import calibration_report
from lightning_quant.callbacks import (
    DistillationCallback,
    LoRACallback,
    PackedBaseCallback,
    QATCallback,
    QuantizationMonitor,
    RandomStateCallback,
)
from lightning_quant.checkpoint import load_from_checkpoint
from lightning_quant.compare import Comparison, compare
from lightning_quant.compiling import compile
from lightning_quant.coverage import CalibrationReport
from lightning_quant.explain import Choice, Explanation, explain
from lightning_quant.merging import Merged, merge_adapter
from lightning_quant.mixed import Sensitivity
from lightning_quant.optimizers import make_optimizer
from lightning_quant.plots import plot_sensitivity
from lightning_quant.precision import QuantPrecision
from lightning_quant.pretrained import load_pretrained
from lightning_quant.quantize import quantize
from lightning_quant.recipe import Recipe
from lightning_quant.report import Summary, summary
from lightning_quant.sensitivity import sensitivity
from lightning_quant.serialization import load_quantized, save_quantized
from lightning_quant.spec import PRESETS, QuantScheme, QuantSpec
from lightning_quant.surgery import convert, param_groups, prepare
from lightning_quant.text import CausalLMModule, TextDataModule
from lightning_quant.trainer import Trainer
from lightning_quant.unpacking import unpack

__version__ = "0.1.0"
