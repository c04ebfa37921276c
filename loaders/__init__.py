"""The DataLoader side: plans, samplers, ids that travel inside the batch, negatives, tables that workers re-open."""

from samplewise.loaders.arrange import DistinctBatches
from samplewise.loaders.episodes import Episodes
from samplewise.loaders.ids import SAMPLE_ID, collate_with_ids, ids_of, with_ids
from samplewise.loaders.negatives import CollateRetrieval, RetrievalDataset, corpus_fingerprint, known_positives
from samplewise.loaders.options import SamplerOptions
from samplewise.loaders.plan import Plan
from samplewise.loaders.ragged import Ragged
from samplewise.loaders.sampler import PlannedSampler
from samplewise.loaders.schedule import FixedSchedule, Schedule
from samplewise.loaders.table import Table

__all__ = [
    "SAMPLE_ID",
    "CollateRetrieval",
    "DistinctBatches",
    "Episodes",
    "FixedSchedule",
    "Plan",
    "PlannedSampler",
    "Ragged",
    "RetrievalDataset",
    "SamplerOptions",
    "Schedule",
    "Table",
    "collate_with_ids",
    "corpus_fingerprint",
    "ids_of",
    "known_positives",
    "with_ids",
]
