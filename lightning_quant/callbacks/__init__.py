"""Lightning callbacks, one a file."""

from lightning_quant.callbacks.qat import QATCallback

__all__ = ["QATCallback"]
