"""The loss in torchtitan's place for one, where torchtitan 0.3 is installed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracle import relative_error
from tests.test_adapter_snippets import run_snippet

titan: Any = pytest.importorskip("torchtitan.components.loss", reason="needs torchtitan 0.3")


class Decoder(nn.Module):
    """A body whose classifier is applied by the loss, as torchtitan's decoders leave it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(97, 16)
        self.layer = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 97, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.layer(self.tok_embeddings(ids)).tanh()
        return hidden


def test_in_place_of_the_chunked_loss() -> None:
    """Built by its configuration and called by the trainer's contract: equal loss and gradients."""
    ours: Any = run_snippet("VocabParallelLoss")["VocabParallelLoss"]  # as docs/adapters.md has it
    ids = torch.randint(97, (2, 16))
    labels = ids.roll(-1, 1)
    labels[0, 9:] = -100
    valid = (labels != -100).sum()
    found: dict[str, tuple[Tensor, list[Tensor]]] = {}
    for name, config in (
        ("theirs", titan.ChunkedLossWrapper.Config(num_chunks=4)),
        ("ours", ours.Config()),
    ):
        model = Decoder()
        loss_fn = config.build(compile_config=None)
        assert isinstance(loss_fn, titan.ChunkedLossWrapper), "what the trainer asks"
        loss_fn.set_lm_head(model.lm_head)
        for _ in range(2):  # microbatches whose gradients add up
            loss, metrics = loss_fn(model(ids), labels, 2 * valid)
            assert metrics == {}
            loss.backward()
        grads = [parameter.grad for parameter in model.parameters()]
        assert all(grad is not None for grad in grads)
        found[name] = (loss.detach(), grads)
        with torch.no_grad():
            validation, _ = loss_fn(model(ids), labels, valid)
        assert relative_error(validation, 2 * loss.detach()) < 1e-6
    assert relative_error(found["ours"][0], found["theirs"][0]) < 1e-6
    for ours, theirs in zip(found["ours"][1], found["theirs"][1], strict=True):
        assert relative_error(ours, theirs) < 1e-5
