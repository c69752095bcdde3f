# torchrun --nproc-per-node 4 examples/pipeline.py
"""A pipeline under 1F1B: its classifier lies over two ranks, its losses are one process's."""

import gc
import os
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import vocab_parallel as vp
from stage_groups import build_stage_groups

VOCABULARY, HIDDEN = 1000, 32


def main() -> None:
    """Train over all ranks, and compare with one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    groups = build_stage_groups(pipeline=2, vocab=2)

    torch.manual_seed(0)  # the same model on every rank
    first = nn.Sequential(nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, HIDDEN))
    last = nn.Sequential(nn.Tanh(), nn.Linear(HIDDEN, HIDDEN))
    head = nn.Linear(HIDDEN, VOCABULARY)
    whole = deepcopy(nn.Sequential(first, last, head).to(device))

    module, loss = first, vp.no_loss
    if is_last := groups.has_last_stage(num_stages=2):
        rows = vp.VocabParallelClassifier.from_linear(head, groups.vocab_group)
        module = nn.Sequential(last, rows)
        loss = vp.CCEPipelineLoss(rows, hidden_layout="sharded")
    stage = PipelineStage(module, groups.pipeline_rank, 2, device, group=groups.pipeline_group)
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=loss, scale_grads=False)
    vp.validate_pipeline_loss(schedule, loss)

    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    batch = torch.randint(VOCABULARY, (2, 8, 16)).to(device)
    tokens = batch[groups.vocab_rank]  # each column has its own sequences
    history, losses = [], []
    for _ in range(10):
        if is_last:
            loss.num_valid_tokens = vp.count_valid_tokens(tokens, [groups.vocab_group], shift=1)
            schedule.step(target=tokens, losses=losses, return_outputs=False)
            history.append(sum(losses).detach())
        else:
            schedule.step(tokens)
        vp.sum_over_columns(module, groups)  # or their bodies drift apart
        vp.clip_grad_norm_(module, 1.0, groups)
        optimizer.step()
        optimizer.zero_grad()

    vp.validate_columns(module, groups)
    if is_last:
        compare(history, whole, batch.flatten(0, 1))


def compare(history: list[Tensor], whole: nn.Module, tokens: Tensor) -> None:
    """Assert that one process, with every logit in memory, has these losses."""
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.01)
    for loss in history:
        exact = nn.functional.cross_entropy(whole(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:])
        torch.testing.assert_close(loss, exact, rtol=1e-4, atol=0.0)
        optimizer.zero_grad()
        exact.backward()
        nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
    print(f"loss {history[0]:.3f} to {history[-1]:.3f}, as in one process")


if __name__ == "__main__":
    main()
    gc.collect()  # a group that is still held at the end may abort the interpreter
    dist.barrier()
    dist.destroy_process_group()
