# torchrun --nproc-per-node 4 examples/all_stages.py
"""A pipeline of four stages: every one holds rows of the vocabulary, at both ends of the model."""

import gc
import os
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

import vocab_parallel as vp
from stage_groups import build_stage_groups

VOCABULARY, HIDDEN, STAGES = 1000, 32, 4


def main() -> None:
    """Train over all ranks, and compare with one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    groups = build_stage_groups(pipeline=STAGES, vocab=1, vocab_over="all_stages")

    torch.manual_seed(0)  # the same model on every rank
    layers = [nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh()) for _ in range(STAGES)]
    embedding, head = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, VOCABULARY, bias=False)
    embedding.weight = head.weight  # tied
    whole = deepcopy(nn.Sequential(embedding, *layers, head).to(device))

    classifier = vp.VocabParallelClassifier.from_linear(head, groups.vocab_group)
    own = vp.VocabParallelEmbedding(HIDDEN, VOCABULARY, group=groups.vocab_group)
    own.weight = classifier.weight  # the same rows of the same rank: one parameter
    module = nn.ModuleDict({"layers": layers[groups.pipeline_rank], "rows": classifier}).to(device)
    module.forward = module["layers"].forward  # the first stage is given embeddings
    own.weight = classifier.weight  # `to` may have put another in its place
    stage = PipelineStage(module, groups.pipeline_rank, STAGES, device, group=groups.pipeline_group)
    loss = vp.CCEPipelineLoss(classifier)
    schedule = vp.SpanningSchedule(stage, 8, loss, groups, "1F1B", embedding=own, scale_grads=False)

    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    tokens = torch.randint(VOCABULARY, (16, 16)).to(device)
    history, losses = [], []
    for _ in range(10):
        loss.num_valid_tokens = vp.count_valid_tokens(tokens, shift=1)
        schedule.step(tokens, target=tokens, losses=losses, return_outputs=False)
        vp.clip_grad_norm_(module, 1.0, groups)
        optimizer.step()
        optimizer.zero_grad()
        if losses:  # on the rank of the last stage
            history.append(sum(losses).detach())
    compare(history, whole, tokens)


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
    if history:
        print(f"loss {history[0]:.3f} to {history[-1]:.3f}, as in one process")


if __name__ == "__main__":
    main()
    gc.collect()  # a group that is still held at the end may abort the interpreter
    dist.barrier()
    dist.destroy_process_group()
