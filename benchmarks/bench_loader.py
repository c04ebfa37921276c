"""A whole pass of a DataLoader with a planned sampler, against torch's own samplers; and the state's size."""

import io
from itertools import islice

import torch
from timing import best_of, header, table
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from samplewise.loaders import collate_with_ids, with_ids
from samplewise.plugins import SeTa, Uniform


class Rows:
    """A data set in memory that fetches whole batches."""

    def __init__(self, size: int):
        self.x = torch.zeros(size, 1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.x[index]

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return self.x[indices]


def keep(batch: torch.Tensor) -> torch.Tensor:
    return batch


def drain(iterable: object) -> None:
    for _ in iterable:
        pass


def main() -> None:
    size = 1_000_000
    header(f"Loading, N = {size:,} (one pass)")
    data = Rows(size)
    samplers = [
        ("RandomSampler", RandomSampler(data)),
        ("DistributedSampler", DistributedSampler(data, num_replicas=1, rank=0)),
        ("Uniform", Uniform(size)),
        ("SeTa", SeTa(size, epochs=10)),
    ]
    base = best_of(lambda: drain(samplers[0][1]), repeat=3)
    rows = []
    for name, sampler in samplers:
        ids = best_of(lambda sampler=sampler: drain(sampler), repeat=3)
        first = best_of(lambda sampler=sampler: list(islice(sampler, 1)), repeat=3)
        per_id = ids / len(sampler) * 1e9
        rows.append([name, f"{per_id:.0f}", f"{per_id / (base / size * 1e9):.2f}x", f"{first * 1e3:.1f}"])
    table(["sampler alone", "ns an id", "to RandomSampler", "ms to the first"], rows)

    bare = best_of(lambda: drain(DataLoader(data, batch_size=256, shuffle=True, collate_fn=keep)), repeat=3)
    rows = [["shuffle=True", f"{bare / size * 1e9:.0f}", "1.00x"]]
    loader = DataLoader(with_ids(data), batch_size=256, sampler=Uniform(size), collate_fn=collate_with_ids(keep))
    ours = best_of(lambda: drain(loader), repeat=3)
    rows.append(["with_ids + Uniform", f"{ours / size * 1e9:.0f}", f"{ours / bare:.2f}x"])
    table(["DataLoader, vectorised batches of 256", "ns a sample", "ratio"], rows)

    rows = []
    for n in (10**5, 10**6):
        for sampler in (Uniform(n), SeTa(n, epochs=10)):
            file = io.BytesIO()
            len(sampler)
            seconds = best_of(lambda sampler=sampler, file=file: torch.save(sampler.state_dict(), file), repeat=1)
            file = io.BytesIO()
            torch.save(sampler.state_dict(), file)
            name = type(sampler).__name__
            rows.append([name, f"{n:,}", f"{file.tell() / n:.1f}", f"{seconds * 1e3:.1f}"])
    table(["checkpoint", "N", "bytes a sample", "ms"], rows)


if __name__ == "__main__":
    main()
