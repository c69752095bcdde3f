"""The loss as other trainers call it, against what they compute themselves."""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM

from stage_groups import build_stage_groups
from tests.oracle import relative_error
from tests.ranks import run_ranks
from vocab_parallel import (
    CCEPipelineLoss,
    count_valid_tokens,
    validate_pipeline_loss,
)
from vocab_parallel.adapters import HiddenStatesLoss, shard_output_embeddings

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


def test_factory_of_output_embeddings() -> None:
    """Forgather's contract: a partial that gets get_output_embeddings(), then (hidden, labels)."""
    model = tiny("llama", tie_word_embeddings=False)
    factory = functools.partial(CCEPipelineLoss, backward="recompute")
    loss = factory(model.get_output_embeddings())
    ids = torch.randint(97, (2, 9))
    hidden = model.base_model(ids).last_hidden_state
    assert relative_error(loss(hidden, ids), model(ids, labels=ids).loss) < 1e-6


class TinyCausalLM(nn.Module):
    """A model that a splitter cuts by deleting what is another stage's."""

    def __init__(self) -> None:
        super().__init__()
        self.config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=False)
        self.input_encoder: nn.Module | None = nn.Embedding(97, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.output_decoder: nn.Module | None = nn.Linear(32, 97, bias=False)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.output_decoder

    def set_output_embeddings(self, module: nn.Module) -> None:
        self.output_decoder = module

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs if self.input_encoder is None else self.input_encoder(inputs)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return hidden if self.output_decoder is None else self.output_decoder(hidden)


def split_by_deletion(
    model: TinyCausalLM, example_args: Any, example_kwargs: Any, stage_indices: Any, train: bool,
    device: Any, rank: int, pp_group: Any,
) -> Any:  # fmt: skip
    """A splitter of one column, with the signature and the results of Forgather's."""
    modules = []
    for stage in range(2):
        module = copy.deepcopy(model)
        module.layers = module.layers[2 * stage : 2 * stage + 2]
        if stage == 1:
            module.input_encoder = None
        else:
            module.output_decoder = None
        modules.append(module)
    stages = [PipelineStage(modules[i], i, 2, device, group=pp_group) for i in stage_indices[rank]]
    return modules, [modules[i] for i in stage_indices[rank]], stages, None


def check_splitter() -> None:
    """A step on 2 x 2 ranks, its columns' sequences unlike, against one process."""
    groups = build_stage_groups(2, 2, device_type="cpu")
    torch.manual_seed(0)
    model = TinyCausalLM()
    ids = torch.randint(97, (8, 6))
    hidden_size = 32
    expected = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    exact = torch.autograd.grad(expected, list(model.parameters()))
    named = dict(zip(dict(model.named_parameters()), exact, strict=True))
    splitter = shard_output_embeddings(
        split_by_deletion,
        pipeline_rank=groups.pipeline_rank,
        pipeline_group=groups.pipeline_group,
        vocab_group=groups.vocab_group,
    )
    device = torch.device("cpu")
    _, (module,), (stage,), _ = splitter(model, (), {}, [(0,), (1,)], True, device, 0, None)
    own = ids.chunk(2)[groups.vocab_rank]
    is_last = groups.has_last_stage(2)
    loss: Any = print
    if is_last:
        assert module.output_decoder.weight.shape == (49 - groups.vocab_rank, hidden_size)
        factory = functools.partial(CCEPipelineLoss, hidden_layout="sharded")
        loss = factory(module.get_output_embeddings())
        loss.num_valid_tokens = count_valid_tokens(own, [groups.vocab_group], shift=1)
    schedule = Schedule1F1B(stage, n_microbatches=2, loss_fn=loss, scale_grads=False)
    validate_pipeline_loss(schedule, loss)
    losses: list[Tensor] = []
    inputs, target = ([], own) if is_last else ([own], None)
    schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
    if is_last:
        assert relative_error(torch.stack(losses).sum(), expected) < 1e-5
        head = module.output_decoder
        want = named["output_decoder.weight"][head.start : head.stop]
        assert relative_error(head.weight.grad, want) < 1e-5
    for index, layer in enumerate(module.layers):
        total = layer.weight.grad.clone()
        dist.all_reduce(total, group=groups.vocab_group)
        name = f"layers.{2 * groups.pipeline_rank + index}.weight"
        assert relative_error(total, named[name]) < 1e-5
    model.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="VocabParallelEmbedding and TiedRows"):
        splitter(model, (), {}, [(0,), (1,)], True, device, 0, None)
    model.config.tie_word_embeddings = False
    model.output_decoder = None
    with pytest.raises(ValueError, match=r"expected a last stage with an nn\.Linear"):
        splitter(model, (), {}, [(0,), (1,)], True, device, 0, None)


def test_splitter() -> None:
    run_ranks(check_splitter, 4)


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


def test_over_ranks() -> None:
    run_ranks(check_hidden_states_loss, 3)
