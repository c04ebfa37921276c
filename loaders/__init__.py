"""The DataLoader side: plans, samplers, and ids that travel inside the batch."""

from samplewise.loaders.ids import SAMPLE_ID, collate_with_ids, ids_of, with_ids
from samplewise.loaders.plan import Plan
from samplewise.loaders.sampler import PlannedSampler, SamplerOptions

__all__ = ["SAMPLE_ID", "Plan", "PlannedSampler", "SamplerOptions", "collate_with_ids", "ids_of", "with_ids"]
