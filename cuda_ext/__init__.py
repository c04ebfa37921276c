"""Per-sample bookkeeping: the ledger and the ops under it."""

from samplewise.cuda_ext.ledger import Ledger

__all__ = ["Ledger"]
