"""`attach(trainer, sampler)` where the training data is a stream."""

import datasets
import pytest
import torch
from huggingface_support import ROWS, Keyed, Told, joined, losses_told, prepare, stream_of, told_rows

from samplewise.loaders.key_index import KeyIndex
from samplewise.loaders.streams import keep
from support import HardHalf, Lengths

pytestmark = [pytest.mark.filterwarnings("error:attach")]


def hugging_face(sampler):
    stage = keep(sampler, KeyIndex.from_keys([f"k{row}" for row in range(ROWS)]))

    def rows():
        for row, item in enumerate(told_rows()):
            yield {"__key__": f"k{row}", **{key: float(value) for key, value in item.items()}}

    features = {"__key__": "string", "x": "float32", "labels": "float32"}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in features.items()})
    return datasets.IterableDataset.from_generator(rows, features=features).map(stage.batch, batched=True, batch_size=4)


@pytest.mark.parametrize(("stream", "workers"), [(stream_of, 0), (stream_of, 1), (hugging_face, 0)])
def test_a_stream_passes_on_what_is_planned(tmp_path, stream, workers):
    """22, 11 and 5 samples: 11, 6 and 3 batches, then the first of the next pass."""
    sampler = Lengths(ROWS, lengths=[22, 11, 5, 22])
    settings = {"max_steps": 21, "gradient_accumulation_steps": 1, "dataloader_num_workers": workers}
    trainer, noted = prepare(tmp_path, sampler, model=Told(), data=stream(sampler), **settings)
    trainer.train()
    assert trainer.state.global_step == 21
    for begin, count, end in ((0, 22, 11), (11, 11, 17), (17, 5, 20)):
        assert joined(noted.ids[begin:end]) == list(range(count))
    assert noted.ids[20] == [0, 1]
    assert (sampler.epoch, sampler.epoch_length, sampler.sharding) == (3, "plan", "sampler")
    assert (sampler.ledger.column("loss_last").numpy() == losses_told()).all()
    kept = [row["samplewise/kept"] for row in trainer.state.log_history if "samplewise/kept" in row]
    assert kept == pytest.approx([1, 0.5, 5 / 22, 1])


def test_resuming_restores_the_ledger_and_says_what_it_cannot(tmp_path):
    sampler = HardHalf(ROWS)
    settings = {"model": Told(), "max_steps": 14, "gradient_accumulation_steps": 1}
    trainer, _ = prepare(tmp_path, sampler, data=stream_of(sampler), save_strategy="steps", save_steps=8, **settings)
    trainer.train()
    sampler = HardHalf(ROWS)
    trainer, _ = prepare(tmp_path, sampler, data=stream_of(sampler), **settings)
    with pytest.raises(RuntimeError, match=r"does not save the place in a stream.*ignore_data_skip=True"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    sampler = HardHalf(ROWS)
    trainer, noted = prepare(tmp_path, sampler, data=stream_of(sampler), ignore_data_skip=True, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert joined(noted.ids[:6]) == list(range(12))
    assert sampler.ledger.seen.tolist() == [row < 16 for row in range(ROWS)]
    assert trainer.state.global_step == 14


def test_a_stream_without_a_stage(tmp_path):
    trainer, _ = prepare(tmp_path, HardHalf(ROWS), model=Told(), data=Keyed(), max_steps=2)
    with pytest.raises(RuntimeError, match=r"Keyed, is a stream, which takes no sampler. Put a stage into it"):
        trainer.train()


def test_a_stream_whose_ids_get_lost(tmp_path):
    sampler = HardHalf(ROWS)
    stream_of(sampler)
    trainer, _ = prepare(tmp_path, sampler, model=Told(), data=Keyed(), max_steps=2)
    with pytest.raises(KeyError, match="an item carries no id"):
        trainer.train()


def test_nothing_is_dispatched(tmp_path):
    sampler = HardHalf(ROWS)
    trainer, _ = prepare(tmp_path, sampler, model=Told(), data=stream_of(sampler), max_steps=2)
    loader = trainer.get_train_dataloader()
    assert type(loader).__name__ != "DataLoaderDispatcher"
    assert isinstance(loader.dataset, torch.utils.data.IterableDataset)
    assert next(iter(loader))["sample_id"].tolist() == [0, 1]
