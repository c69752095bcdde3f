"""What is added to the pipeline loss: an auxiliary loss, and that of the next token but one.

Two losses over one classifier are multi-token prediction: their gradients add up in rows that are
sharded.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from stage_groups import StageGroups, build_stage_groups
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.toy_pipeline import SINGLE, V_SHAPED
from vocab_parallel import (
    CCEPipelineLoss,
    VocabParallelClassifier,
    count_valid_tokens,
    validate_pipeline_loss,
)

HIDDEN, VOCABULARY, LENGTH, BATCH, MICROBATCHES, PIPELINE = 6, 23, 8, 8, 4, 2
SECOND, AUXILIARY = 0.3, 0.1  # weights of the losses


class Body(nn.Module):
    """One stage: tokens or (hidden, auxiliary [b]) in; out of the last, hidden states twice."""

    def __init__(self, whole: nn.ModuleDict, index: int, last: int, head: nn.Module | None) -> None:
        super().__init__()
        self.embedding = whole["embedding"] if index == 0 else None
        self.layer = whole[f"layer{index}"]
        self.second = whole["second"] if index == last else None
        self.head = head

    def forward(self, inputs: Tensor, auxiliary: Tensor | None = None) -> tuple[Tensor, ...]:
        hidden = inputs if self.embedding is None else self.embedding(inputs)
        hidden = torch.tanh(self.layer(hidden))
        own = hidden.square().mean((1, 2))
        auxiliary = own if auxiliary is None else auxiliary + own
        if self.second is None:
            return hidden, auxiliary
        return hidden, torch.tanh(self.second(hidden)), auxiliary


def toy(num_stages: int) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {f"layer{i}": nn.Linear(HIDDEN, HIDDEN) for i in range(num_stages)}
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(VOCABULARY, HIDDEN),
            **layers,
            "second": nn.Linear(HIDDEN, HIDDEN),
            "head": nn.Linear(HIDDEN, VOCABULARY, bias=False),
        }
    ).double()


def one_process(num_stages: int, tokens: Tensor) -> tuple[Tensor, nn.ModuleDict]:
    """Return the loss of all columns' tokens (columns * BATCH, LENGTH), its gradients made."""
    whole = toy(num_stages)
    inputs: tuple[Tensor, ...] = (tokens,)
    for index in range(num_stages):
        inputs = Body(whole, index, num_stages - 1, None)(*inputs)
    first, second, auxiliary = inputs

    def loss_of(hidden: Tensor, shift: int) -> Tensor:
        logits = whole["head"](hidden)[:, :-shift]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, shift:].flatten())

    loss = loss_of(first, 1) + SECOND * loss_of(second, 2) + AUXILIARY * auxiliary.mean()
    loss.backward()
    return loss.detach(), whole


def check(schedule: str, layout: str, accumulate_into: str | None, groups: StageGroups) -> None:
    single = schedule in SINGLE
    num_stages = PIPELINE * (1 if single else 2)
    style: Any = "v" if schedule in V_SHAPED else "loop"
    columns = groups.vocab_degree if layout == "sharded" else 1
    tokens = torch.randint(
        VOCABULARY, (columns * BATCH, LENGTH), generator=torch.Generator().manual_seed(1)
    )
    expected_loss, expected = one_process(num_stages, tokens)
    own = tokens.chunk(columns)[groups.vocab_rank if columns > 1 else 0]

    whole = toy(num_stages)
    has_last = groups.has_last_stage(num_stages, style)
    head: Any = None
    losses = []
    loss_fn: Any = print
    if has_last:
        head = VocabParallelClassifier.from_linear(whole["head"], groups.vocab_group)
        if accumulate_into == "main_grad":
            head.weight.main_grad = torch.zeros_like(head.weight)
        losses = [
            CCEPipelineLoss(
                head, shift=shift, hidden_layout=layout, accumulate_into=accumulate_into
            )
            for shift in (1, 2)
        ]
        counted = [groups.vocab_group] if columns > 1 else []
        for shift, loss in zip((1, 2), losses, strict=True):
            loss.num_valid_tokens = count_valid_tokens(own, counted, shift=shift)

        def loss_fn(output: tuple[Tensor, Tensor, Tensor], labels: Tensor) -> Tensor:
            first, second, auxiliary = output
            cross_entropy = losses[0](first, labels) + SECOND * losses[1](second, labels)
            # The mean over this column's sequences; the columns' gradients are summed.
            return cross_entropy + (AUXILIARY / columns / BATCH * auxiliary).sum()

    indices = groups.stages(num_stages, style)
    modules = [
        Body(whole, index, num_stages - 1, head if index == num_stages - 1 else None)
        for index in indices
    ]
    stages = [
        PipelineStage(module, index, num_stages, torch.device("cpu"), group=groups.pipeline_group)
        for module, index in zip(modules, indices, strict=True)
    ]
    made = get_schedule_class(schedule)(
        stages[0] if single else stages,
        n_microbatches=MICROBATCHES,
        loss_fn=loss_fn,
        scale_grads=False,
    )
    for which in range(2):
        validate_pipeline_loss(made, losses[which] if losses else loss_fn)
    found: list[Tensor] = []
    made.step(
        *([own] if 0 in indices else []),
        target=own if has_last else None,
        losses=found if has_last else None,
        return_outputs=False,
    )
    case = (schedule, layout, accumulate_into)
    if has_last and columns == 1:  # elsewhere each rank adds its own auxiliary loss
        assert relative_error(torch.stack(found).sum(), expected_loss) < 1e-12, case
    for module, index in zip(modules, indices, strict=True):
        for name, parameter in module.named_parameters():
            gradient = parameter.grad
            want = expected.get_parameter(name.replace("layer", f"layer{index}")).grad
            if name.startswith("head"):
                want = want[head.start : head.stop]
                if accumulate_into == "main_grad":
                    assert gradient is None, case
                    gradient = parameter.main_grad
            elif columns > 1:
                gradient = gradient.clone()
                dist.all_reduce(gradient, group=groups.vocab_group)
            assert relative_error(gradient, want) < 1e-11, (*case, index, name)


def check_all() -> None:
    groups = build_stage_groups(PIPELINE, 2, device_type="cpu")
    for schedule in ("1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"):
        for layout in ("replicated", "sharded"):
            check(schedule, layout, None, groups)
            if schedule in ("1F1B", "Interleaved1F1B"):
                check(schedule, layout, "grad", groups)
                check(schedule, layout, "main_grad", groups)


def test_auxiliary_loss_and_two_losses_over_one_classifier() -> None:
    run_ranks(check_all, 4)
