# torchrun --nproc-per-node 2 examples/reinforcement.py
"""Reinforcement learning: log-probabilities and entropies over a sharded vocabulary.

A policy answers each prompt with one token and is rewarded for even ones. The loss is GRPO's
clipped ratio with an entropy bonus; its gradients are those of the whole logits.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vocab_parallel import VocabParallelClassifier, token_logprobs

VOCABULARY, HIDDEN, PROMPTS, ANSWERS = 500, 32, 8, 16


def grpo(logprobs: Tensor, old: Tensor, entropy: Tensor, advantage: Tensor) -> Tensor:
    """Return the loss of answers [prompts, answers]."""
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(0.8, 1.2)
    return -(torch.minimum(ratio * advantage, clipped * advantage) + 0.01 * entropy).mean()


def main() -> None:
    """Train the policy, and compare every gradient with that of whole logits."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(0)  # the same policy and the same draws on every rank
    policy = nn.Embedding(PROMPTS, HIDDEN).to(device)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    rows = VocabParallelClassifier.from_linear(head.to(device), None)  # of the world
    rows.pipeline_mode = False  # rows(hidden) gathers the logits of a few tokens
    optimizer = torch.optim.Adam([*policy.parameters(), *rows.parameters()], lr=0.03)
    means = []
    prompts = torch.arange(PROMPTS, device=device)
    for _ in range(10):
        with torch.no_grad():
            log_p = rows(policy(prompts)).log_softmax(-1)
            answers = torch.multinomial(log_p.exp(), ANSWERS, replacement=True)
            dist.broadcast(answers, 0)
            old = log_p.gather(1, answers)
            reward = (answers % 2 == 0).float()
            spread = reward.std(1, keepdim=True) + 1e-4
            advantage = (reward - reward.mean(1, keepdim=True)) / spread
        means.append(reward.mean())
        for _ in range(2):
            hidden = policy(prompts)
            e = hidden.unsqueeze(1).expand(-1, ANSWERS, -1)  # [prompts, answers, D]
            logprobs, entropy = token_logprobs(
                e, rows.weight, answers, return_entropy=True, vocab_parallel_options=rows.options
            )
            loss = grpo(logprobs, old, entropy, advantage)
            optimizer.zero_grad()
            loss.backward()

            exact = hidden.detach().requires_grad_()
            log_p = rows(exact).log_softmax(-1)
            whole_entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
            dense = grpo(log_p.gather(1, answers), old, whole_entropy, advantage)
            torch.testing.assert_close(loss, dense, rtol=1e-4, atol=1e-5)
            (expected,) = torch.autograd.grad(dense, exact)
            assert (policy.weight.grad - expected).norm() < 1e-3 * expected.norm()
            optimizer.step()
    assert means[-1] > 0.8 > means[0]
    if dist.get_rank() == 0:
        print(f"mean reward {means[0]:.2f} to {means[-1]:.2f}")


if __name__ == "__main__":
    main()
    gc.collect()  # a group that is still held at the end may abort the interpreter
    dist.barrier()
    dist.destroy_process_group()
