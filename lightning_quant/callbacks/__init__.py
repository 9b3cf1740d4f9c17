"""Lightning callbacks, one a file."""

from lightning_quant.callbacks.distillation import DistillationCallback
from lightning_quant.callbacks.lora import LoRACallback
from lightning_quant.callbacks.monitor import QuantizationMonitor
from lightning_quant.callbacks.packed_base import PackedBaseCallback
from lightning_quant.callbacks.qat import QATCallback
from lightning_quant.callbacks.random_state import RandomStateCallback

__all__ = [
    "DistillationCallback",
    "LoRACallback",
    "PackedBaseCallback",
    "QATCallback",
    "QuantizationMonitor",
    "RandomStateCallback",
]
