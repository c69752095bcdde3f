# torchrun --nproc-per-node 2 examples/evaluation.py
"""Evaluation over a sharded vocabulary: predictions, perplexity and accuracy without logits.

Each rank has its own sequences and half of the classifier's rows. Results are those of the whole
logits.
"""

import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

from vocab_parallel import (
    TokenScores,
    VocabParallelOptions,
    count_valid_tokens,
    predict,
    score_tokens,
)

VOCABULARY, HIDDEN, BATCHES, BATCH, LENGTH = 1001, 32, 3, 4, 16


def main() -> None:
    """Score three batches on every rank, and compare with whole logits."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, degree = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same classifier and data on every rank
    classifier = torch.randn(VOCABULARY, HIDDEN).to(device) / HIDDEN**0.5
    tokens = torch.randint(VOCABULARY, (BATCHES, degree, BATCH, LENGTH)).to(device)
    noise = torch.randn(*tokens.shape, HIDDEN).to(device)
    hidden = 6.0 * classifier[tokens.roll(-1, -1)] + noise  # most predictions are right
    labels = tokens.masked_fill(torch.rand(tokens.shape).to(device) < 0.2, -100)

    options = VocabParallelOptions.from_vocab(VOCABULARY)  # of the world
    rows = classifier[options.start : options.stop]
    shards = {"vocab_parallel_options": options, "hidden_layout": "sharded"}
    zero = torch.zeros((), dtype=torch.float64, device=device)
    scores = TokenScores(zero, zero, zero)
    for e, targets in zip(hidden[:, rank], labels[:, rank], strict=True):
        scores += score_tokens(e, rows, targets, shift=1, **shards)
    for each in (scores.nll, scores.correct, scores.count):
        dist.all_reduce(each)  # the ranks have other tokens
    count = count_valid_tokens(labels[:, rank], [dist.group.WORLD], shift=1)
    best = predict(hidden[0, rank], rows, k=5, **shards)

    logits = hidden @ classifier.T
    wanted = labels[..., 1:].flatten()
    valid = wanted != -100
    nll = F.cross_entropy(logits[..., :-1, :].flatten(0, -2).double(), wanted)
    right = logits[..., :-1, :].argmax(-1).flatten() == wanted
    assert scores.count == count == valid.sum()
    assert abs(scores.perplexity / nll.exp().item() - 1) < 1e-5
    assert scores.accuracy == right[valid].double().mean().item()
    assert torch.equal(best.ids, logits[0, rank].topk(5).indices)
    logprobs = logits[0, rank].log_softmax(-1).topk(5).values
    torch.testing.assert_close(best.scores - best.lse[..., None], logprobs, rtol=1e-4, atol=1e-4)
    if rank == 0:
        print(f"perplexity {scores.perplexity:.3f}, accuracy {scores.accuracy:.3f}, {count} tokens")


if __name__ == "__main__":
    main()
    gc.collect()  # a group that is still held at the end may abort the interpreter
    dist.barrier()
    dist.destroy_process_group()
