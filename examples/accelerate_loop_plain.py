"""A loop with accelerate, before samplewise: accelerate_loop.py is the same with three lines changed.

On several processes: torchrun --nproc_per_node 2 accelerate_loop_plain.py
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from digits import Digits, accuracy, network
from torch.utils.data import DataLoader

EPOCHS = 10
accelerator = Accelerator(cpu=True)
train_set = Digits(train=True)
loader = DataLoader(train_set, batch_size=32, shuffle=True)
model = network()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for epoch in range(EPOCHS):
    for batch in loader:
        losses = F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")
        loss = losses.mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

accelerator.print(f"accuracy {accuracy(accelerator.unwrap_model(model)):.3f}")
