"""The loss as other trainers call it, against what they compute themselves."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.oracle import relative_error
from tests.ranks import run_ranks
from vocab_parallel import CCEPipelineLoss
from vocab_parallel.adapters import CausalLMLoss, HiddenStatesLoss

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def tiny(model_type: str, **given: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **given)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("model_type", "given"),
    [
        ("qwen3", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("gemma2", {"final_logit_softcapping": 0.1}),
    ],
)
def test_forward_stays_untouched(model_type: str, given: dict[str, Any]) -> None:
    """The loss and every gradient of model(**batch).loss, also with Trainer's divisor."""
    model = tiny(model_type, **given)
    ids = torch.randint(97, (3, 12))
    labels = ids.clone()
    labels[0, 5:] = -100
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    for count in (None, 50, torch.tensor(50)):
        extra = {} if count is None else {"num_items_in_batch": count}
        expected = model(**batch, **extra).loss
        found = CausalLMLoss()(model, batch, count)
        assert relative_error(found, expected) < 1e-6
        exact = torch.autograd.grad(expected, list(model.parameters()))
        ours = torch.autograd.grad(found, list(model.parameters()))
        for (name, _), got, want in zip(model.named_parameters(), ours, exact, strict=True):
            assert relative_error(got, want, 1e-6) < 1e-4, name
    with pytest.raises(ValueError, match="give the unwrapped model"):
        CausalLMLoss()(nn.Linear(2, 2), batch)
    with pytest.raises(ValueError, match="inputs must have labels"):
        CausalLMLoss()(model, {"input_ids": ids})


def test_factory_of_output_embeddings() -> None:
    """Forgather's contract: a partial that gets get_output_embeddings(), then (hidden, labels)."""
    model = tiny("llama", tie_word_embeddings=False)
    factory = functools.partial(CCEPipelineLoss, backward="recompute")
    loss = factory(model.get_output_embeddings())
    ids = torch.randint(97, (2, 9))
    hidden = model.base_model(ids).last_hidden_state
    assert relative_error(loss(hidden, ids), model(ids, labels=ids).loss) < 1e-6


def check_hidden_states_loss() -> None:
    """torchtitan's contract over a tensor-parallel mesh, the classifier a DTensor."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(23, 6, generator=generator, dtype=torch.float64)
    hidden = torch.randn(2, 9, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(23, (2, 9), generator=generator)
    labels[1, 3:] = -100
    leaves = [rows.clone().requires_grad_(), hidden.clone().requires_grad_()]
    for divisor in (None, torch.tensor(40)):
        expected = F.cross_entropy(
            (leaves[1] @ leaves[0].T).flatten(0, 1), labels.flatten(), reduction="sum"
        ) / (1 if divisor is None else 40)
        exact = torch.autograd.grad(expected, leaves)
        for placement in (Replicate(), Shard(1)):
            head = nn.Linear(6, 23, bias=False)
            head.weight = nn.Parameter(distribute_tensor(rows, mesh, [Shard(0)]))
            loss = HiddenStatesLoss(z_loss=0.0)
            with pytest.raises(ValueError, match="call set_lm_head"):
                loss(hidden, labels)
            loss.set_lm_head(head)
            e = distribute_tensor(hidden, mesh, [placement]).detach().requires_grad_()
            found, metrics = loss(e, labels, divisor)
            assert metrics == {}
            assert relative_error(found, expected) < 1e-12
            found.backward()
            assert isinstance(head.weight.grad, DTensor)
            assert isinstance(e.grad, DTensor)
            assert relative_error(head.weight.grad.full_tensor(), exact[0]) < 1e-12
            assert relative_error(e.grad.full_tensor(), exact[1]) < 1e-12
    dist.barrier()


def test_hidden_states_loss() -> None:
    run_ranks(check_hidden_states_loss, 3)
