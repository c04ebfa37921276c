"""A plain PyTorch loop that leaves out samples which are learnt already; torch_loop_plain.py is the same without."""

import torch
import torch.nn.functional as F
from digits import Digits, accuracy, network
from torch.utils.data import DataLoader

from samplewise.loaders import with_ids
from samplewise.plugins import InfoBatch

EPOCHS = 10
train_set = Digits(train=True)
sampler = InfoBatch(len(train_set), epochs=EPOCHS)
loader = DataLoader(with_ids(train_set), batch_size=32, sampler=sampler)
model = network()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

for epoch in range(EPOCHS):
    for batch in loader:
        losses = F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")
        loss = sampler.observe(batch["sample_id"], losses)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

print(f"accuracy {accuracy(model):.3f}")
