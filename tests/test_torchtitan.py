"""The loss in torchtitan's place for one, where torchtitan 0.3 is installed."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.oracle import oracle, relative_error
from tests.ranks import run_ranks

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
    from vocab_parallel.torchtitan import CutCrossEntropyLoss

    ids = torch.randint(97, (2, 16))
    labels = ids.roll(-1, 1)
    labels[0, 9:] = -100
    valid = (labels != -100).sum()
    found: dict[str, tuple[Tensor, list[Tensor]]] = {}
    for name, config in (
        ("theirs", titan.ChunkedLossWrapper.Config(num_chunks=4)),
        ("ours", CutCrossEntropyLoss.Config()),
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


def check_plain_shards() -> None:
    """Its default backend hands over plain rows: the loss finds their place on the active mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torchtitan.distributed.spmd_types import set_current_spmd_mesh
    from torchtitan.distributed.utils import get_spmd_backend

    from vocab_parallel.torchtitan import CutCrossEntropyLoss, cut_cross_entropy

    assert get_spmd_backend() == "spmd_types"
    degree = dist.get_world_size()
    mesh = init_device_mesh("cpu", (degree,), mesh_dim_names=("tp",))
    whole = Decoder()
    ids = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(1))
    labels, valid = ids.roll(-1, 1), torch.tensor(29)
    labels[0, 13:] = -100
    hidden = whole(ids).detach().requires_grad_()
    exact = nn.functional.cross_entropy(
        whole.lm_head(hidden).flatten(0, 1), labels.flatten(), reduction="sum"
    )
    (exact / valid).backward()
    assert hidden.grad is not None
    for scale, options in ((1.0, {}), (3.0, {"hidden_grad_scale": 3.0})):
        own = hidden.detach().clone().requires_grad_()
        head = nn.Linear(16, 97, bias=False)
        shard = whole.lm_head.weight.detach().split(-(-97 // degree))[dist.get_rank()]
        head.weight = nn.Parameter(shard.clone())
        config = cut_cross_entropy(titan.ChunkedLossWrapper.Config(), **options)
        loss_fn = config.build(compile_config=None)
        assert isinstance(loss_fn, CutCrossEntropyLoss)
        loss_fn.set_lm_head(head)
        with set_current_spmd_mesh(mesh):
            loss, _ = loss_fn(own, labels, valid)
        loss.backward()
        assert relative_error(loss, exact / valid) < 1e-6
        assert own.grad is not None
        dist.all_reduce(own.grad)  # as torchtitan does
        assert relative_error(own.grad, scale * hidden.grad) < 1e-5
        rows = whole.lm_head.weight.grad.split(-(-97 // degree))[dist.get_rank()]
        assert relative_error(head.weight.grad, rows) < 1e-5
    dist.barrier()


def test_plain_shards_of_its_default_backend() -> None:
    run_ranks(check_plain_shards, 2)


def test_the_option_puts_it_in_the_place_of_the_chunked_loss() -> None:
    """What --override.imports does with the name, by torchtitan's own function."""
    from torchtitan.config.configurable import Configurable
    from torchtitan.config.override import OverrideConfig, apply_overrides

    from vocab_parallel.torchtitan import CutCrossEntropyLoss

    @dataclass(kw_only=True, slots=True)
    class Root(Configurable.Config):
        loss: Any

    name = "vocab_parallel.torchtitan.cut_cross_entropy"
    config = Root(loss=titan.ChunkedLossWrapper.Config())
    options = {"z_loss": 1e-4}
    (line,) = apply_overrides(OverrideConfig(imports=[(name, options)]), config)
    assert name in line
    assert config.loss == CutCrossEntropyLoss.Config(options=options)
    loss_fn: Any = config.loss.build(compile_config=None)
    head, hidden = nn.Linear(16, 97, bias=False), torch.randn(1, 5, 16)
    loss_fn.set_lm_head(head)
    labels = torch.randint(97, (1, 5))
    found, _ = loss_fn(hidden, labels, torch.tensor(5))
    exact, _ = oracle(hidden.double(), head.weight.double(), labels, **options)
    assert relative_error(found, exact) < 1e-6


def test_what_it_is_not_put_in_the_place_of() -> None:
    """Heads whose logits are more than a product, and other losses than cross-entropy."""
    from torchtitan.models.common.linear import Linear

    from vocab_parallel.torchtitan import CutCrossEntropyLoss, cut_cross_entropy

    class SoftCapped(Linear):
        @dataclass(kw_only=True, slots=True)
        class Config(Linear.Config):
            pass

        def forward(self, hidden: Tensor) -> Tensor:
            return 3.0 * (super().forward(hidden) / 3.0).tanh()

    loss_fn: Any = CutCrossEntropyLoss.Config().build(compile_config=None)
    plain, capped = (
        kind.Config(in_features=16, out_features=97).build() for kind in (Linear, SoftCapped)
    )
    for head in (plain, capped):
        head.forward = titan.cross_entropy_loss  # some function of torchtitan's, as it sets one
    loss_fn.set_lm_head(plain)
    assert plain.forward is titan.cross_entropy_loss
    with pytest.raises(ValueError, match="SoftCapped that has a forward of its own"):
        loss_fn.set_lm_head(capped)
    mean_square = titan.ChunkedLossWrapper.Config(loss_fn=titan.MSELoss.Config())
    with pytest.raises(ValueError, match=r"this chunked loss is of MSELoss\.Config"):
        cut_cross_entropy(mean_square)
