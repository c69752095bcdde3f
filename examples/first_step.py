# torchrun --nproc-per-node 1 examples/first_step.py
"""One process: the loss of hidden states, and no logits."""

import torch
from torch import nn

from vocab_parallel import linear_cross_entropy

torch.manual_seed(0)
hidden = torch.randn(4, 32, 64, requires_grad=True)  # what a model's body returns
head = nn.Linear(64, 5000)
labels = torch.randint(5000, (4, 32))  # -100 is ignored

loss = linear_cross_entropy(hidden, head.weight, labels, head.bias, shift=1)
loss.backward()
print(f"loss {loss.item():.4f}")

logits = head(hidden)[:, :-1]  # [4, 31, 5000], which the loss never made
dense = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
assert torch.allclose(loss, dense)
