# torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""A tensor-parallel body whose tensor-parallel ranks are the vocab group.

The body ends sharded over the sequence, the classifier is a DTensor sharded over its rows, and
the loss takes both as they are. Five steps have the losses and the weights of one process.
"""

import gc
import os
from copy import deepcopy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from vocab_parallel import CCEPipelineLoss

VOCABULARY, HIDDEN, BATCH, LENGTH = 1000, 32, 4, 16


class Model(nn.Module):
    """Hidden states [b, T, D]; the loss multiplies them by ``lm_head``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN, bias=False)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the body."""
        return self.down(F.gelu(self.up(self.embedding(tokens))))


def main() -> None:
    """Train over both ranks, and compare each step with one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("tp",))

    torch.manual_seed(0)  # the same model and tokens on every rank
    model = Model().to(device)
    whole = deepcopy(model)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH)).to(device)

    rowwise = RowwiseParallel(output_layouts=Shard(1))  # [b, T / V, D] on each rank
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": rowwise})
    rows = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
    model.lm_head.weight = nn.Parameter(rows)
    loss_of = CCEPipelineLoss(model.lm_head, hidden_layout="sequence")

    for _ in range(5):
        loss = loss_of(model(tokens), tokens)  # labels are whole; position t predicts t + 1
        logits = whole.lm_head(whole(tokens))[:, :-1]
        dense = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.testing.assert_close(loss, dense, rtol=1e-5, atol=0.0)
        loss.backward()
        dense.backward()
        for module in (model, whole):
            torch.optim.SGD(module.parameters(), lr=1.0, foreach=False).step()
            module.zero_grad()
    trained = model.lm_head.weight.full_tensor()
    torch.testing.assert_close(trained, whole.lm_head.weight, rtol=1e-4, atol=1e-5)
    if dist.get_rank() == 0:
        print(f"loss {loss:.3f}, as in one process; {rows.to_local().shape[0]} rows on this rank")


if __name__ == "__main__":
    main()
    gc.collect()  # a group that is still held at the end may abort the interpreter
    dist.barrier()
    dist.destroy_process_group()
