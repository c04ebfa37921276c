"""Per-sample bookkeeping: the ledger, losses of single samples, and the ops under them."""

from samplewise.cuda_ext import native
from samplewise.cuda_ext.ledger import Ledger
from samplewise.cuda_ext.losses import SampleLosses, sample_losses
from samplewise.cuda_ext.sharded import ShardedLedger

NATIVE = native.load()
"""What became of the native kernels, a line for each device."""

__all__ = ["NATIVE", "Ledger", "SampleLosses", "ShardedLedger", "sample_losses"]
