import gzip

import numpy as np
import pytest
import torch

from samplewise.loaders.seeding import generator
from samplewise.recipes import data
from samplewise.recipes.assets import MARKER, AssetError
from samplewise.recipes.data import TensorRows, flip_labels, load_task, read_folder, stratified
from samplewise.recipes.models import build


def test_rows_come_one_by_one_and_by_the_batch():
    rows = TensorRows(torch.arange(12).reshape(6, 2), torch.arange(6))
    x, y = rows.__getitems__([4, 1])
    assert x.tolist() == [[8, 9], [2, 3]]
    assert y.tolist() == [4, 1]
    assert rows[4][0].tolist() == x[0].tolist()
    assert len(rows) == 6


@pytest.mark.parametrize("size", [1, 7, 50, 99])
def test_stratified_keeps_class_shares(size):
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    rows = stratified(labels, size, generator(0, "x"))
    assert len(rows) == len(set(rows.tolist())) == size
    assert np.abs(np.bincount(labels[rows], minlength=3) - size * np.array([0.5, 0.3, 0.2])).max() < 1


def test_flipped_labels_are_another_class_and_the_same_each_time():
    labels = torch.arange(1000) % 10
    noisy, count = flip_labels(labels, 0.3, 10, generator(0, "noise"))
    again, _ = flip_labels(labels, 0.3, 10, generator(0, "noise"))
    assert count == int((noisy != labels).sum()) == 300
    assert torch.equal(noisy, again)
    assert set(noisy.unique().tolist()) == set(range(10))
    assert torch.equal(flip_labels(labels, 0.0, 10, generator(0, "noise"))[0], labels)


def idx(array):
    sizes = np.array(array.shape, dtype=">i4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.mark.parametrize("packed", [True, False])
def test_idx_folder(tmp_path, packed):
    images, labels = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3), np.array([1, 0], dtype=np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        for part in ("train", "t10k"):
            raw = idx(array)
            path = tmp_path / f"{part}-{name}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(raw) if packed else raw)
    task = load_task(str(tmp_path))
    assert task.train.x.shape == (2, 1, 4, 3)
    assert torch.equal(task.train.x[:, 0], torch.from_numpy(images))
    assert task.test.y.tolist() == [1, 0]
    assert (task.classes, task.metric, task.name) == (2, "accuracy", tmp_path.name)


def test_npz_folder_with_colours_and_a_model_for_it(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "test"):
        arrays[f"{part}_x"] = rng.integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
        arrays[f"{part}_y"] = np.arange(20) % 4
    np.savez(tmp_path / "arrays.npz", **arrays)
    task = load_task(str(tmp_path))
    assert task.train.x.shape == (20, 3, 8, 8)
    assert task.mean.shape == (3,)
    for name in ("auto", "cnn", "mlp"):
        assert build(task, name)(task.test.x[:5]).shape == (5, 4)
    with pytest.raises(ValueError, match=r"build\(model='vit'\): one of auto, cnn, mlp"):
        build(task, "vit")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_x": [1], "train_y": [1]}, "lacks test_x, test_y"),
        ({"train_x": [1, 2], "train_y": [1], "test_x": [1], "test_y": [1]}, "train_x and train_y have different"),
    ],
)
def test_npz_that_is_wrong(tmp_path, arrays, message):
    np.savez(tmp_path / "arrays.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


def test_folder_that_is_not_understood(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of arrays.npz, train-images-idx3-ubyte\*, flights.csv\*"):
        load_task(str(tmp_path))


FLIGHTS = """year,month,day,dep_delay,sched_dep_time,sched_arr_time,carrier,origin,dest,distance,hour,time_hour
2013,1,1,2,515,819,UA,EWR,IAH,1400,5,t0
2013,1,2,16,529,830,UA,LGA,IAH,1416,5,t1
2013,1,30,NA,540,850,AA,JFK,MIA,1089,5,t2
2013,2,1,15,540,850,AA,JFK,MIA,1089,5,t2
"""
WEATHER = "origin,time_hour,temp,humid,wind_speed,precip,pressure\nEWR,t0,39,59,10,0,1012\nLGA,t1,40,NA,8,0,1012\n"


@pytest.mark.parametrize("in_cache", [True, False])
def test_flights(tmp_path, in_cache):
    (tmp_path / "flights.csv").write_text(FLIGHTS)
    (tmp_path / "weather.csv").write_text(WEATHER)
    if in_cache:
        (tmp_path / MARKER).write_text("{}")
    task = load_task(str(tmp_path))
    assert (task.metric, task.classes, len(task.codes)) == ("auc", 2, len(data.CODES))
    assert task.train.y.tolist() == [0, 1]  # late by more than 15 minutes, in weeks 0-3 of the year
    assert task.test.y.tolist() == [1, 0]  # cancelled; week 4
    assert task.train.x.shape == (2, len(data.NUMBERS) + len(data.CODES))
    assert not task.train.x.isnan().any()
    assert build(task)(task.train.x).shape == (2, 2)
    with pytest.raises(ValueError, match="no cnn for a table"):
        build(task, "cnn")
    assert (tmp_path / "arrays.npz").exists() is in_cache  # a user's folder is left alone
    assert torch.equal(load_task(str(tmp_path)).train.x, task.train.x)


def test_auto_falls_back_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "flights.csv").write_text(FLIGHTS)
    (tmp_path / "weather.csv").write_text(WEATHER)
    (tmp_path / MARKER).write_text('{"source": "a package"}')

    def resolve(name, say):
        if name == "fashion_mnist":
            raise AssetError("fashion_mnist could not be had. Tried: everything")
        return tmp_path

    monkeypatch.setattr(data, "resolve", resolve)
    lines = []
    task = load_task("auto", say=lines.append)
    assert (task.name, task.source) == ("nycflights", "a package")
    assert "Tried: everything" in lines[0]
    assert "going on with nycflights" in lines[0]


def test_digits_subset_and_noise():
    task = load_task("digits", train_size=300, label_noise=0.2)
    assert (len(task.train), len(task.test), task.flipped) == (300, 449, 60)
    assert task.train.x.dtype == torch.uint8
    assert task.train.x.shape[1:] == (1, 8, 8)
