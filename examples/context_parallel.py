# torchrun --nproc-per-node 4 examples/context_parallel.py
"""Each sequence over two context-parallel ranks, each's classifier over two vocab ranks.

A cp rank has an early and a late piece of every sequence, so that causal attention costs all the
same; labels are shifted before. Five steps have the losses and weights of one process.
"""

import gc
from copy import deepcopy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

from vocab_parallel import CCEPipelineLoss, VocabParallelClassifier, count_valid_tokens

VOCABULARY, HIDDEN, BATCH, LENGTH = 1000, 32, 2, 32


class Model(nn.Module):
    """A part's hidden states [b, T / cp, D], which attend to keys and values of all parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.attention = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, cp: DeviceMesh | None = None) -> Tensor:
        """Run the body; in one process without ``cp``."""
        q, k, v = self.attention(self.embedding(tokens)).chunk(3, -1)
        found = (k, v, positions[None])
        if cp is not None:  # a key's gradients from all parts come back to it in a sum
            parts = [DTensor.from_local(each, cp, [Shard(1)]) for each in found]
            found = tuple(part.full_tensor(grad_placements=[Partial()]) for part in parts)
        return F.scaled_dot_product_attention(q, *found[:2], positions[:, None] >= found[2])


def main() -> None:
    """Train over all ranks, and compare each step with one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("cp", "vocab"))
    cp, group = mesh["cp"], mesh.get_group("cp")

    torch.manual_seed(0)  # the same model and tokens on every rank
    model = Model().to(device)
    whole = deepcopy(model)
    rows = VocabParallelClassifier.from_linear(model.lm_head, mesh.get_group("vocab"))
    model.lm_head, loss_of = rows, CCEPipelineLoss(rows, shift=0)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), device=device)
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)  # shifted while sequences are whole
    positions = torch.arange(LENGTH, device=device)
    pieces, rank = positions.chunk(2 * cp.size()), cp.get_local_rank()
    own = torch.cat((pieces[rank], pieces[-1 - rank]))

    for _ in range(5):
        loss_of.num_valid_tokens = count_valid_tokens(labels[:, own], [group])  # of all parts
        loss = loss_of(model(tokens[:, own], own, cp), labels[:, own])
        loss.backward()
        for summed in (loss.detach(), *(each.grad for each in model.parameters())):
            dist.all_reduce(summed, group=group)  # sums, no means: the loss is divided already
        dense = F.cross_entropy(whole.lm_head(whole(tokens, positions)).mT, labels)
        torch.testing.assert_close(loss, dense, rtol=1e-5, atol=0.0)
        dense.backward()
        for module in (model, whole):
            torch.optim.SGD(module.parameters(), lr=1.0, foreach=False).step()
            module.zero_grad()
    exact = whole.lm_head.weight[rows.start : rows.stop]
    torch.testing.assert_close(rows.weight, exact, rtol=1e-4, atol=1e-5)
    print(f"loss {loss:.3f}, as in one process")


if __name__ == "__main__":
    main()
    gc.collect()  # a group that is still held at the end may abort the interpreter
    dist.barrier()
    dist.destroy_process_group()
