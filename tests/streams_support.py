"""Small streams: real tar shards, pipelines over them, and losses that tell their key."""

import io
import tarfile

import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

decoded = []  # keys, of this process


def write_shards(folder, shards, each):
    """Write tar shards of ``each`` samples with the keys ``"2/0007"``, the 8th of shard 2; their paths."""
    paths = [str(folder / f"{shard:03d}.tar") for shard in range(shards)]
    for shard, path in enumerate(paths):
        with wds.TarWriter(path) as writer:
            for number in range(each):
                writer.write({"__key__": f"{shard}/{number:04d}", "txt": f"{shard} {number}"})
    return paths


def write_tar(path, files):
    """Write a tar of empty files, or of folders where the name ends in a slash."""
    with tarfile.open(path, "w") as tar:
        for name in files:
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO())
    return str(path)


def keys_of(shards, each):
    """The keys of :func:`write_shards`, in order."""
    return [f"{shard}/{number:04d}" for shard in range(shards) for number in range(each)]


def decode(sample):
    """A decoder that tells what it decoded."""
    decoded.append(sample["__key__"])
    shard, number = sample["txt"].decode().split()
    return {**sample, "txt": torch.tensor([int(shard), int(number)])}


def web(paths, *stages, **options):
    """A webdataset pipeline of (row, key, decoded text), with ``stages`` before the decoding."""
    options = {"shardshuffle": False, "empty_check": False, **options}
    return wds.WebDataset(paths, **options).compose(*stages).map(decode).to_tuple("sample_id", "__key__", "txt")


class Numbers(IterableDataset):
    """Samples with the integer keys 0 ... size - 1, divided among the workers."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return ({"key": number, "value": 10 * number} for number in range(first, self.size, step))


def loss_of_key(key):
    """A loss that tells its key, exact in float32."""
    shard, number = key.split("/")
    return 1.0 + int(shard) * 1000 + int(number)


def observe(sampler, ids, keys):
    """Report the losses of a batch."""
    return sampler.observe(ids, torch.tensor([loss_of_key(key) for key in keys], requires_grad=True))


def epoch_of(sampler, loader, epoch):
    """Train one epoch: what was passed on, as (row, key) pairs in order."""
    sampler.set_epoch(epoch)
    passed = []
    for ids, keys, _ in loader:
        observe(sampler, ids, keys)
        passed += zip(ids.tolist(), keys, strict=True)
    return passed
