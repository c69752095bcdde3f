"""The loss inside a schedule, against the same model in one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from stage_groups import build_stage_groups
from tests.oracle import relative_error
from tests.ranks import run_ranks
from vocab_parallel import CCEPipelineLoss, VocabParallelClassifier, validate_pipeline_loss

HIDDEN, VOCABULARY, LENGTH, BATCH, MICROBATCHES = 6, 23, 8, 8, 4


class ToyStage(nn.Module):
    """An embedding on the first stage, a layer on each, the classifier on the last."""

    def __init__(self, whole: nn.ModuleDict, is_first: bool, head: nn.Module | None) -> None:
        super().__init__()
        self.embedding = whole["embedding"] if is_first else None
        self.layer = whole["first" if is_first else "second"]
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs if self.embedding is None else self.embedding(inputs)
        hidden = torch.tanh(self.layer(hidden))
        return hidden if self.head is None else self.head(hidden)


def toy_model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(VOCABULARY, HIDDEN),
            "first": nn.Linear(HIDDEN, HIDDEN),
            "second": nn.Linear(HIDDEN, HIDDEN),
            "head": nn.Linear(HIDDEN, VOCABULARY, bias=True),
        }
    ).double()


def check_schedule(vocab: int, layout: str) -> None:
    groups = build_stage_groups(2, vocab, device_type="cpu")
    is_last = groups.has_last_stage(2)
    columns = vocab if layout == "sharded" else 1
    torch.manual_seed(1)
    tokens = torch.randint(VOCABULARY, (columns, BATCH, LENGTH))
    labels = tokens.clone()
    labels[:, 1::2, 5:] = -100  # as many in every microbatch, so that a mean of means is a mean
    labels[:, 2:4] = -100  # a microbatch of padding

    reference = toy_model()
    losses_expected = []
    for start in range(0, BATCH, BATCH // MICROBATCHES):
        own = slice(start, start + BATCH // MICROBATCHES)
        hidden = torch.tanh(reference["first"](reference["embedding"](tokens[:, own])))
        logits = reference["head"](torch.tanh(reference["second"](hidden)))
        loss = F.cross_entropy(
            logits[:, :, :-1].reshape(-1, VOCABULARY),
            labels[:, own, 1:].reshape(-1),
            reduction="sum",
        ) / max(int((labels[:, own, 1:] != -100).sum()), 1)
        losses_expected.append(loss.detach())
        (loss / MICROBATCHES).backward()

    column = groups.vocab_rank if layout == "sharded" else 0
    for name in ("GPipe", "1F1B"):
        whole = toy_model()
        head = None
        if is_last:
            head = VocabParallelClassifier.from_linear(whole["head"], groups.vocab_group)
        stage = ToyStage(whole, groups.pipeline_rank == 0, head)
        loss = CCEPipelineLoss(head, hidden_layout=layout) if head is not None else print
        schedule = get_schedule_class(name)(
            PipelineStage(
                stage, groups.pipeline_rank, 2, torch.device("cpu"), group=groups.pipeline_group
            ),
            n_microbatches=MICROBATCHES,
            loss_fn=loss,
        )
        validate_pipeline_loss(schedule, loss)
        losses: list[Tensor] = []
        schedule.step(
            *([] if is_last else [tokens[column]]),
            target=labels[column] if is_last else None,
            losses=losses if is_last else None,
            return_outputs=False,
        )
        for found, expected in zip(losses, losses_expected if is_last else [], strict=True):
            assert relative_error(found, expected, 1.0) < 1e-12
        for parameter_name, parameter in stage.named_parameters():
            gradient = parameter.grad
            if parameter_name.startswith("head."):
                expected = reference.get_parameter(parameter_name).grad[head.start : head.stop]
            else:
                if layout == "sharded":
                    dist.all_reduce(gradient, group=groups.vocab_group)
                expected = reference.get_parameter(
                    parameter_name.replace("layer", "second" if is_last else "first")
                ).grad
            assert relative_error(gradient, expected) < 1e-12, (name, parameter_name)


@pytest.mark.parametrize(
    ("vocab", "layout"), [(1, "replicated"), (2, "sharded"), (2, "replicated")]
)
def test_schedules(vocab: int, layout: str) -> None:
    run_ranks(check_schedule, 2 * vocab, vocab=vocab, layout=layout)


def check_refusals() -> None:
    whole = toy_model()
    head = VocabParallelClassifier.from_linear(whole["head"], None)
    for owned, loss, message in (
        (None, CCEPipelineLoss(head), "is not a parameter of the last stage's module"),
        (head, CCEPipelineLoss(whole["head"]), "is not a parameter of the last stage's module"),
        (head, CCEPipelineLoss(head.weight, torch.zeros(VOCABULARY)), "not a parameter"),
        (head, F.cross_entropy, "must be a CCEPipelineLoss"),
        (head, CCEPipelineLoss(head), None),
        (head, CCEPipelineLoss(head.weight, head.bias), None),
    ):
        stage = PipelineStage(ToyStage(whole, True, owned), 0, 1, torch.device("cpu"))
        schedule = get_schedule_class("GPipe")(stage, n_microbatches=2, loss_fn=loss)
        if message is None:
            validate_pipeline_loss(schedule, loss)
        else:
            with pytest.raises(ValueError, match=message):
                validate_pipeline_loss(schedule, loss)
    with pytest.raises(ValueError, match="must be a schedule of torch"):
        validate_pipeline_loss(None, CCEPipelineLoss(head))


def test_refusals() -> None:
    run_ranks(check_refusals, 1)
