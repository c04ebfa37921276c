"""The HF Trainer, with samplewise; hf_trainer_plain.py is the same without.

On several processes: torchrun --nproc_per_node 2 hf_trainer.py
"""

from datasets import Dataset
from digits import Digits, accuracy, transformer
from transformers import Trainer, TrainingArguments

from samplewise.callbacks.huggingface import attach
from samplewise.plugins import InfoBatch

EPOCHS = 10
digits = Digits(train=True)
train_set = Dataset.from_dict({"pixel_values": digits.images.numpy(), "labels": digits.labels.numpy()})
model = transformer()
settings = {"per_device_train_batch_size": 32, "learning_rate": 3e-3, "save_strategy": "no", "report_to": []}
arguments = TrainingArguments("checkpoints", num_train_epochs=EPOCHS, use_cpu=True, **settings)
trainer = Trainer(model, arguments, train_dataset=train_set.with_format("torch"))
sampler = InfoBatch(len(train_set), epochs=EPOCHS)
attach(trainer, sampler)
trainer.train()

print(f"accuracy {accuracy(model):.3f}")
