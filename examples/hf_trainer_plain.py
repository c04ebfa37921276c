"""The HF Trainer, before samplewise: hf_trainer.py is the same with two lines more.

On several processes: torchrun --nproc_per_node 2 hf_trainer_plain.py
"""

from datasets import Dataset
from digits import Digits, accuracy, transformer
from transformers import Trainer, TrainingArguments

EPOCHS = 10
digits = Digits(train=True)
train_set = Dataset.from_dict({"pixel_values": digits.images.numpy(), "labels": digits.labels.numpy()})
model = transformer()
settings = {"per_device_train_batch_size": 32, "learning_rate": 3e-3, "save_strategy": "no", "report_to": []}
arguments = TrainingArguments("checkpoints", num_train_epochs=EPOCHS, use_cpu=True, **settings)
trainer = Trainer(model, arguments, train_dataset=train_set.with_format("torch"))
trainer.train()

print(f"accuracy {accuracy(model):.3f}")
