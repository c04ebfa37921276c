"""A loop with accelerate that leaves out samples which are learnt already; accelerate_loop_plain.py is without.

On several processes: torchrun --nproc_per_node 2 accelerate_loop.py
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from digits import Digits, accuracy, network
from torch.utils.data import DataLoader

from samplewise.callbacks.huggingface import attach
from samplewise.loaders import with_ids
from samplewise.plugins import InfoBatch

EPOCHS = 10
accelerator = Accelerator(cpu=True)
train_set = Digits(train=True)
loader = DataLoader(with_ids(train_set), batch_size=32, sampler=InfoBatch(len(train_set), epochs=EPOCHS))
model = network()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
sampler = attach(accelerator, loader)

for epoch in range(EPOCHS):
    for batch in loader:
        losses = F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")
        loss = sampler.observe(batch["sample_id"], losses)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

accelerator.print(f"accuracy {accuracy(accelerator.unwrap_model(model)):.3f}")
