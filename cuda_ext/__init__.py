"""Per-sample bookkeeping: the ledger and the ops under it."""

from samplewise.cuda_ext import native
from samplewise.cuda_ext.ledger import Ledger

NATIVE = native.load()
"""What became of the native kernels, a line for each device."""

__all__ = ["NATIVE", "Ledger"]
