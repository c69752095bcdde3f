# torchrun --nproc-per-node 2 examples/grpo.py
"""GRPO (arXiv 2402.03300, section 4.1) over a sharded vocabulary.

Each rank has its own prompts and a group of answers to each. The loss needs log-probabilities of
the policy with their gradient, those of a frozen reference, and entropies to look at: no logits.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

import vocab_parallel as vp

VOCABULARY, HIDDEN, PROMPTS, ANSWERS, LENGTH = 500, 32, 3, 4, 6
CLIP, KL_WEIGHT = 0.2, 0.04


def grpo(logprobs: Tensor, old: Tensor, reference: Tensor, reward: Tensor, mask: Tensor) -> Tensor:
    """Return the loss of answers [prompts, answers, T], rewarded [prompts, answers]."""
    spread = reward.std(1, keepdim=True) + 1e-4
    advantage = ((reward - reward.mean(1, keepdim=True)) / spread).unsqueeze(-1)
    ratio = (logprobs - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    further = reference - logprobs
    kl = further.exp() - further - 1  # k3: never negative, unbiased
    return -(((gain - KL_WEIGHT * kl) * mask).sum(-1) / mask.sum(-1)).mean()


def main() -> None:
    """Take some steps, each beside that of the whole logits."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same policy on every rank, and all ranks' answers
    body = nn.Sequential(nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, HIDDEN)).to(device)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=False).to(device)
    head = vp.VocabParallelClassifier.from_linear(linear, None)  # rows of this rank, of the world
    known = {"vocab_parallel_options": head.options, "hidden_layout": "sharded"}
    known |= {"shift": 1, "return_entropy": True}
    tokens = torch.randint(VOCABULARY, (ranks, PROMPTS, ANSWERS, LENGTH + 1)).to(device)[rank]
    reward = (tokens[..., 1:] % 2 == 0).float().mean(-1)  # for even tokens
    mask = (torch.arange(LENGTH, device=device) < 2 + tokens[..., :1] % LENGTH).float()
    with torch.no_grad():
        reference, _ = vp.token_logprobs(body(tokens), head.weight, tokens, **known)
        old = reference + 0.1 * torch.randn(reference.shape).to(device)
    parameters = [*body.parameters(), head.weight]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(5):
        logprobs, entropy = vp.token_logprobs(body(tokens), head.weight, tokens, **known)
        loss = grpo(logprobs, old, reference, reward, mask) / ranks  # a mean over all prompts
        optimizer.zero_grad()
        loss.backward()
        weight = head.gather_rows(head.weight).requires_grad_()
        log_p = torch.log_softmax(body(tokens)[..., :-1, :] @ weight.T, -1)
        chosen = log_p.gather(-1, tokens[..., 1:, None]).squeeze(-1)
        dense = grpo(chosen, old, reference, reward, mask) / ranks
        torch.testing.assert_close(loss, dense, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-4)
        expected = list(torch.autograd.grad(dense, [*body.parameters(), weight]))
        dist.all_reduce(expected[-1])  # the rows have learnt from all ranks' answers
        expected[-1] = expected[-1][head.start : head.stop]
        for parameter, want in zip(parameters, expected, strict=True):
            assert (parameter.grad - want).norm() < 1e-3 * want.norm()
        for parameter in body.parameters():  # the body is replicated: its gradients add up
            dist.all_reduce(parameter.grad)
        optimizer.step()
    if rank == 0:
        print(f"loss {loss:.4f}, entropy {(entropy * mask).sum() / mask.sum():.3f}")


if __name__ == "__main__":
    main()
    gc.collect()  # a group that is still held at the end may abort the interpreter
    dist.barrier()
    dist.destroy_process_group()
