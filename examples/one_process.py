# torchrun --nproc-per-node 1 examples/one_process.py
"""One process: the loss of the hidden states in place of the loss of the logits.

The loss and every gradient are those of ``F.cross_entropy(model(tokens))``, but the logits
[tokens, vocabulary] never exist as a whole. `linear_cross_entropy` has the argument names of
cut-cross-entropy: its user changes the import.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vocab_parallel import available_impls, linear_cross_entropy

VOCABULARY, HIDDEN, BATCH, LENGTH = 5000, 64, 4, 33


def main() -> None:
    """Compare the loss, its options and its gradients with the dense computation."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    body = nn.Sequential(nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
    head = nn.Linear(HIDDEN, VOCABULARY)
    model = nn.Sequential(body, head).to(device)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), device=device)
    tokens[0, 20:] = -100  # padding, as labels
    inputs = tokens.clamp(min=0)

    # Position t predicts token t + 1.
    logits = model(inputs)[:, :-1].flatten(0, 1)
    dense = F.cross_entropy(logits, tokens[:, 1:].flatten())
    loss = linear_cross_entropy(body(inputs), head.weight, tokens, head.bias, shift=1)
    compare(loss, dense, model)

    # Options go together: a softcap, label smoothing, and the z-loss.
    logits = 15.0 * torch.tanh(model(inputs)[:, :-1].flatten(0, 1) / 15.0)
    lse = logits.logsumexp(-1)[tokens[:, 1:].flatten() != -100]
    dense = F.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=0.1)
    dense = dense + 1e-3 * lse.square().mean()
    loss = linear_cross_entropy(
        body(inputs),
        head.weight,
        tokens,
        head.bias,
        shift=1,
        softcap=15.0,
        label_smoothing=0.1,
        z_loss=1e-3,
    )
    compare(loss, dense, model)
    works = [name for name, state in available_impls().items() if state == "ready"]
    print("equal to the dense loss; what works here:", *works)


def compare(loss: torch.Tensor, dense: torch.Tensor, model: nn.Module) -> None:
    """Assert that two losses and their gradients are equal."""
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(dense, parameters)
    for found, exact in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert (found - exact).norm() <= 1e-5 * exact.norm()


if __name__ == "__main__":
    main()
