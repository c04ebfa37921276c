"""A stream of tar files under the HF Trainer, with samplewise; webdataset_stream_plain.py is the same without."""

import tempfile

import webdataset as wds
from digits import accuracy, transformer, write_shards
from transformers import Trainer, TrainingArguments

from samplewise.callbacks.huggingface import attach
from samplewise.loaders.streams import KeyIndex, keep
from samplewise.plugins import InfoBatch

EPOCHS = 10
shards = write_shards(tempfile.mkdtemp())
sampler = InfoBatch(len(index := KeyIndex.from_shards(shards)), epochs=EPOCHS)
stream = wds.WebDataset(shards, shardshuffle=False).compose(keep(sampler, index))
stream = stream.shuffle(500, seed=0).decode(partial=True)
stream = stream.rename(pixel_values="pixel_values.npy", labels="labels.cls")
model = transformer()
settings = {"per_device_train_batch_size": 32, "learning_rate": 3e-3, "save_strategy": "no", "report_to": []}
arguments = TrainingArguments("checkpoints", max_steps=470, use_cpu=True, dataloader_num_workers=2, **settings)
trainer = Trainer(model, arguments, train_dataset=stream)
attach(trainer, sampler)
trainer.train()

print(f"accuracy {accuracy(model):.3f}")
