"""Several predictions, a function of log-probabilities, and metrics, under real schedules.

On 2 x 2 ranks against one process with whole logits, in every layout.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from stage_groups import StageGroups, build_stage_groups
from tests.oracle import metrics_oracle, multi_token_oracle, relative_error
from tests.ranks import run_ranks
from tests.recording import CollectiveRecorder
from tests.toy_pipeline import SINGLE, V_SHAPED, adapted
from vocab_parallel import (
    CCEPipelineLoss,
    DistillationPipelineLoss,
    LogprobsPipelineLoss,
    SpanningSchedule,
    VocabParallelClassifier,
    count_valid_tokens,
    validate_pipeline_loss,
)

HIDDEN, VOCABULARY, LENGTH, BATCH, MICROBATCHES, PIPELINE = 6, 23, 8, 8, 4, 2
SCHEDULES = ("1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
LAYOUTS = ("replicated", "sharded", "sequence")
SHIFT, WEIGHTS = (1, 2, 3), (1.0, 0.3, 0.1)
CPU = torch.device("cpu")


class Body(nn.Module):
    """One stage; the last one returns ``output`` of its hidden states: one, a tuple, a tensor."""

    def __init__(
        self, whole: nn.ModuleDict, index: int, output: str, head: nn.Module | None
    ) -> None:
        super().__init__()
        self.embedding = whole["embedding"] if index == 0 else None
        self.layer = whole[f"layer{index}"]
        self.further = whole["further"] if output in ("tuple", "tensor") else None
        self.output, self.head = output, head

    def forward(self, inputs: Tensor) -> Any:
        hidden = inputs if self.embedding is None else self.embedding(inputs)
        hidden = torch.tanh(self.layer(hidden))
        if self.further is None:
            return hidden
        heads = [hidden]
        for _ in SHIFT[1:]:
            heads.append(torch.tanh(self.further(heads[-1])))
        return tuple(heads) if self.output == "tuple" else torch.stack(heads)


def toy(num_stages: int) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {f"layer{i}": nn.Linear(HIDDEN, HIDDEN) for i in range(num_stages)}
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(VOCABULARY, HIDDEN),
            **layers,
            "further": nn.Linear(HIDDEN, HIDDEN),
            "head": nn.Linear(HIDDEN, VOCABULARY),
        }
    ).double()


class Batch:
    """What a step is given: of all columns, and this rank's part."""

    def __init__(self, layout: str, groups: StageGroups) -> None:
        self.layout, self.rank, self.degree = layout, groups.vocab_rank, groups.vocab_degree
        self.columns = self.degree if layout == "sharded" else 1
        generator = torch.Generator().manual_seed(1)
        size = (self.columns * BATCH, LENGTH)
        self.tokens = torch.randint(VOCABULARY, size, generator=generator)
        self.labels = self.tokens.clone()
        self.labels[torch.rand(size, generator=generator) < 0.2] = -100
        self.labels[2:4] = -100  # a microbatch of padding
        begins = torch.rand(size, generator=generator) < 0.3
        self.document_ids = begins.cumsum(-1)
        self.old = -torch.rand(size, generator=generator, dtype=torch.float64) - 2
        self.advantage = torch.randn(size[0], generator=generator, dtype=torch.float64)

    def own(self, tensor: Tensor) -> Tensor:
        """Cut what the loss is given: this column's sequences, whole."""
        return tensor.chunk(self.columns)[self.rank if self.columns > 1 else 0]

    def own_tokens(self) -> Tensor:
        """Cut what the first stage is given."""
        own = self.own(self.tokens)
        if self.layout != "sequence":
            return own
        return own.chunk(self.degree, 1)[self.rank].contiguous()


def hidden_states(whole: nn.ModuleDict, num_stages: int, output: str, tokens: Tensor) -> Any:
    given: Any = tokens
    for index in range(num_stages):
        given = Body(whole, index, output if index == num_stages - 1 else "", None)(given)
    return given


class Step:
    """A rank's stages and their schedule, run once."""

    def __init__(
        self, schedule: str, output: str, layout: str, groups: StageGroups, make_loss: Any
    ) -> None:
        self.case, self.groups, self.layout = (schedule, output, layout), groups, layout
        single = schedule in SINGLE
        self.num_stages = PIPELINE * (1 if single else 2)
        style: Any = "v" if schedule in V_SHAPED else "loop"
        self.indices = groups.stages(self.num_stages, style)
        whole, last = toy(self.num_stages), self.num_stages - 1
        self.head: Any = None
        self.loss: Any = print
        if groups.has_last_stage(self.num_stages, style):
            self.head = VocabParallelClassifier.from_linear(whole["head"], groups.vocab_group)
            self.loss = make_loss(self.head)
        self.modules = [
            Body(whole, index, output, self.head) if index == last else Body(whole, index, "", None)
            for index in self.indices
        ]
        stages = [
            PipelineStage(module, index, self.num_stages, CPU, group=groups.pipeline_group)
            for module, index in zip(self.modules, self.indices, strict=True)
        ]
        self.schedule = get_schedule_class(schedule)(
            stages[0] if single else stages,
            n_microbatches=MICROBATCHES,
            loss_fn=self.loss,
            scale_grads=False,
        )
        validate_pipeline_loss(self.schedule, self.loss)

    def run(self, tokens: Tensor, target: Tensor | None) -> Tensor | None:
        """Return the sum of the microbatches' losses, on the last stage."""
        losses: list[Tensor] = []
        has_last = self.head is not None
        with CollectiveRecorder() as recorded:
            self.schedule.step(
                *([tokens] if 0 in self.indices else []),
                target=target,
                losses=losses if has_last else None,
                return_outputs=False,
            )
        if has_last and self.layout == "replicated":  # and once more where shapes are inferred
            sums = [call for call in recorded.calls if call.name == "all_reduce"]
            assert len(sums) == MICROBATCHES + 1, (self.case, sums)
        return torch.stack(losses).sum().detach() if has_last else None

    def check(self, found: Tensor | None, want: Tensor, whole: nn.ModuleDict) -> None:
        """Compare the loss and every gradient of this rank with those of one process."""
        if found is not None:
            assert relative_error(found, want, 1.0) < 1e-12, self.case
        for module, index in zip(self.modules, self.indices, strict=True):
            for name, parameter in module.named_parameters():
                gradient = parameter.grad
                assert gradient is not None, (*self.case, name)
                expected = whole.get_parameter(name.replace("layer", f"layer{index}")).grad
                if name.startswith("head"):
                    expected = expected[self.head.start : self.head.stop]
                elif self.layout != "replicated":
                    gradient = gradient.clone()
                    dist.all_reduce(gradient, group=self.groups.vocab_group)
                assert relative_error(gradient, expected) < 1e-11, (*self.case, index, name)


def check_several_predictions(schedule: str, output: str, layout: str, groups: StageGroups) -> None:
    """Of packed documents where the last stage returns a tuple."""
    batch = Batch(layout, groups)
    packed = output == "tuple"
    document_ids = batch.document_ids if packed else None
    options = {"softcap": 5.0, "z_loss": 0.01, "label_smoothing": 0.1}

    def make(head: nn.Module) -> CCEPipelineLoss:
        loss = CCEPipelineLoss(
            head, shift=SHIFT, head_weights=(9.0, 9.0, 9.0), hidden_layout=layout, **options
        )
        loss.head_weights = WEIGHTS
        counted = [groups.vocab_group] if layout == "sharded" else []
        loss.num_valid_tokens = count_valid_tokens(
            batch.own(batch.labels), counted, shift=SHIFT,
            document_ids=batch.own(batch.document_ids) if packed else None,
        )  # fmt: skip
        return loss

    step = Step(schedule, output, layout, groups, make)
    target = None if step.head is None else batch.own(batch.labels)
    if target is not None and packed:
        target = torch.stack((target, batch.own(batch.document_ids)), -2)
    found = step.run(batch.own_tokens(), target)
    whole = toy(step.num_stages)
    heads = hidden_states(whole, step.num_stages, "tensor", batch.tokens)
    want, _ = multi_token_oracle(
        heads, whole["head"].weight, batch.labels, whole["head"].bias, shift=SHIFT,
        head_weights=WEIGHTS, document_ids=document_ids, **options,
    )  # fmt: skip
    want.backward()
    step.check(found, want, whole)


def check_metrics(schedule: str, layout: str, groups: StageGroups) -> None:
    """Of all microbatches of a step, and not of the call that infers shapes."""
    batch = Batch(layout, groups)

    def make(head: nn.Module) -> CCEPipelineLoss:
        return CCEPipelineLoss(
            head, hidden_layout=layout, softcap=5.0, return_metrics=True, scaled_outside=True
        )

    step = Step(schedule, "one", layout, groups, make)
    target = None if step.head is None else batch.own(batch.labels)
    step.run(batch.own_tokens(), target)
    if step.head is not None:
        whole = toy(step.num_stages)
        head: Any = whole["head"]
        want = metrics_oracle(
            hidden_states(whole, step.num_stages, "one", batch.tokens), head.weight, batch.labels,
            head.bias, softcap=5.0, shift=1,
        )  # fmt: skip
        for found, exact in zip(step.loss.metrics(), want, strict=True):
            assert relative_error(found, exact) < 1e-12, step.case


def policy_loss(logprobs: Tensor, entropy: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """A clipped ratio to older log-probabilities [b, T] and an entropy bonus, summed."""
    ratio = (logprobs - batch["old"]).exp()
    advantage = batch["advantage"].unsqueeze(1)
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -((gain + 0.01 * entropy) * batch["counts"]).sum() / LENGTH


def check_function_of_logprobs(schedule: str, layout: str, groups: StageGroups) -> None:
    batch = Batch(layout, groups)
    shift = 1 if layout == "replicated" else 0
    length = LENGTH - shift
    counts = (batch.labels != -100)[:, shift:]
    old = batch.old[:, shift:]
    extras = {"old": old, "advantage": batch.advantage, "counts": counts}
    if layout == "sequence":  # what is a token's lies where its hidden state does
        part = slice(groups.vocab_rank * length // 2, (groups.vocab_rank + 1) * length // 2)
        extras = {**extras, "old": old[:, part], "counts": counts[:, part]}

    def make(head: nn.Module) -> LogprobsPipelineLoss:
        return LogprobsPipelineLoss(
            head, policy_loss, return_entropy=True, hidden_layout=layout, shift=shift, softcap=5.0
        )

    step = Step(schedule, "one", layout, groups, make)
    target = None
    if step.head is not None:
        own = {name: batch.own(tensor) for name, tensor in extras.items()}
        target = step.loss.load(batch.own(batch.labels), **own)
    found = step.run(batch.own_tokens(), target)
    whole = toy(step.num_stages)
    hidden = hidden_states(whole, step.num_stages, "one", batch.tokens)[:, :length]
    log_p = torch.log_softmax(5.0 * torch.tanh(whole["head"](hidden) / 5.0), -1)
    labels = batch.labels[:, shift:].clamp(min=0).unsqueeze(-1)
    dense = {"old": old, "advantage": batch.advantage, "counts": counts}
    want = policy_loss(log_p.gather(-1, labels).squeeze(-1), -(log_p.exp() * log_p).sum(-1), dense)
    want.backward()
    step.check(found, want, whole)


def check_distillation(schedule: str, layout: str, groups: StageGroups, *, top_k: bool) -> None:
    """A teacher's hidden states and rows, or its top-k, mixed with labels, over a step's tokens."""
    batch = Batch(layout, groups)
    generator = torch.Generator().manual_seed(2)
    shape = (*batch.tokens.shape, 5)
    teacher_e = torch.randn(shape, generator=generator, dtype=torch.float64)
    teacher_rows = torch.randn(VOCABULARY, 5, generator=generator, dtype=torch.float64)
    log_q = torch.log_softmax(teacher_e @ teacher_rows.T / 2.0, -1)
    extras = {"teacher_e": teacher_e}
    if top_k:  # all of them: no token is left for the others
        ids = torch.arange(VOCABULARY).expand(log_q.shape)
        extras = {"teacher_ids": ids, "teacher_logprobs": log_q}
    if layout == "sequence":
        extras = {name: part.chunk(2, 1)[groups.vocab_rank] for name, part in extras.items()}

    def make(head: Any) -> DistillationPipelineLoss:
        rows = None if top_k else teacher_rows[head.start : head.stop]
        loss = DistillationPipelineLoss(
            head, rows, hidden_layout=layout, temperature=2.0, softcap=5.0,
            cross_entropy_weight=0.3,
        )  # fmt: skip
        counted = [groups.vocab_group] if layout == "sharded" else []
        loss.num_valid_tokens = count_valid_tokens(batch.own(batch.labels), counted)
        return loss

    step = Step(schedule, "one", layout, groups, make)
    target = None
    if step.head is not None:
        parts = extras if layout == "sequence" else {n: batch.own(x) for n, x in extras.items()}
        target = step.loss.load(batch.own(batch.labels), **parts)
    found = step.run(batch.own_tokens(), target)
    whole = toy(step.num_stages)
    hidden = hidden_states(whole, step.num_stages, "one", batch.tokens)
    logits = 5.0 * torch.tanh(whole["head"](hidden) / 5.0)
    divergence = (log_q.exp() * (log_q - torch.log_softmax(logits / 2.0, -1))).sum(-1)
    counts, labels = batch.labels != -100, batch.labels.clamp(min=0)
    nll = -torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    want = ((0.7 * divergence + 0.3 * nll) * counts).sum() / counts.sum()
    want.backward()
    step.check(found, want, whole)


def check_schedules() -> None:
    groups = build_stage_groups(PIPELINE, 2, device_type="cpu")
    for schedule in SCHEDULES:
        for layout in LAYOUTS:
            for output in ("tuple", "tensor"):
                check_several_predictions(schedule, output, layout, groups)
            check_function_of_logprobs(schedule, layout, groups)
            check_metrics(schedule, layout, groups)
            check_distillation(schedule, layout, groups, top_k=layout == "sharded")
    check_distillation("1F1B", "replicated", groups, top_k=True)


def test_under_schedules() -> None:
    run_ranks(check_schedules, 4, timeout=110)


def check_mistakes() -> None:
    """A batch that is wrong on one rank ends every rank; all stages refuse what they cannot do."""
    groups = build_stage_groups(1, 2, device_type="cpu")
    head = VocabParallelClassifier.from_linear(toy(1)["head"], groups.vocab_group)
    loss = LogprobsPipelineLoss(head, policy_loss)
    labels = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    extras: list[tuple[dict[str, Any], str]] = [
        ({"old": torch.zeros(BATCH - 1)}, r"old must be a tensor \[8, \.\.\.\].*got \[7\]"),
        ({"old": 1.0}, "old must be a tensor.*got float"),
        (
            {"old": torch.zeros(BATCH, requires_grad=True)},
            r"without a gradient .*, got .* with requires_grad=True",
        ),
        ({"new": torch.zeros(BATCH)}, "must agree.*new"),
    ]
    for given, words in extras:
        own = given if groups.vocab_rank else {}
        with pytest.raises(ValueError, match=words):
            loss.load(labels, **own)
    hidden = torch.zeros(BATCH, LENGTH, HIDDEN, dtype=torch.float64)
    with pytest.raises(ValueError, match="call it before the step"):
        loss(hidden, labels)
    target = loss.load(labels)
    with pytest.raises(ValueError, match="call it before the step"):
        loss(hidden, labels)
    loss._function = lambda logprobs, entropy, batch: logprobs
    with pytest.raises(ValueError, match=r"scalar tensor, got \[8, 8\]"):
        loss(hidden, target)

    spanning = build_stage_groups(2, 1, device_type="cpu", vocab_over="all_stages")
    rows = VocabParallelClassifier.from_linear(toy(1)["head"], spanning.vocab_group)
    module = Body(toy(2), spanning.pipeline_rank, "one", rows)
    stage = PipelineStage(module, spanning.pipeline_rank, 2, CPU, group=spanning.pipeline_group)
    for wrong, words in (
        (CCEPipelineLoss(rows, shift=SHIFT), r"does not take shift=\(1, 2, 3\)"),
        (LogprobsPipelineLoss(rows, policy_loss), "must be a CCEPipelineLoss of its rows"),
    ):
        with pytest.raises(ValueError, match=words):
            SpanningSchedule(stage, MICROBATCHES, wrong, spanning, "1F1B")


def test_mistakes() -> None:
    run_ranks(check_mistakes, 2)


def test_several_predictions_of_an_adapted_classifier() -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    layer = adapted(nn.Linear(HIDDEN, VOCABULARY, bias=False).double())
    e = torch.randn(2, 3, LENGTH, HIDDEN, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (3, LENGTH))
    loss = CCEPipelineLoss(layer, shift=(1, 2))
    want, _ = multi_token_oracle(
        e, layer.base_layer.weight + layer.get_delta_weight("default"), labels, shift=(1, 2)
    )
    for output in (e, (e[0], e[1])):
        assert relative_error(loss(output, labels), want) < 1e-12
    with pytest.raises(ValueError, match="of one shape, dtype and device"):
        loss((e[0], e[1, :2]), labels)
    with pytest.raises(
        ValueError, match=r"got tuple: of several predictions give shift one number"
    ):
        CCEPipelineLoss(nn.Linear(HIDDEN, VOCABULARY).double())((e[0], e[1]), labels)


def test_unknown_options() -> None:
    head = nn.Linear(4, 7)
    for given, words in (
        ({"shift": (1, 2), "head_weights": (1.0,)}, "head_weights must be 2 finite numbers"),
        ({"head_weights": (1.0, 2.0)}, "give shift one number for each"),
        ({"shift": ()}, "at least one prediction"),
        ({"shift": (1, 2), "colour": 1}, "colour"),
        ({"shift": (1, 2), "head_weights": 1.0}, "head_weights must be 2 finite numbers"),
        ({"shift": (1, 2), "return_heads": True}, "return_heads is not an option"),
    ):
        with pytest.raises(ValueError, match=words):
            CCEPipelineLoss(head, **given)
    for given, words in (
        ({"reduction": "sum"}, "reduction is not an option of a LogprobsPipelineLoss"),
        ({"accumulate_into": "grad"}, "accumulate_into is not an option"),
        ({"validate": True}, "validate is not an option"),
        ({"colour": 1}, "colour"),
        ({"softcap": -1.0}, "softcap must be a positive number"),
    ):
        with pytest.raises(ValueError, match=words):
            LogprobsPipelineLoss(head, policy_loss, **given)
    for given, words in (
        ({"validate": True}, "validate is not an option of a DistillationPipelineLoss"),
        ({"impl": "chunked"}, "impl is not an option"),
        ({"teacher_ids": None}, "teacher_ids is not an option"),
        ({"reduction": "none"}, "a schedule needs a scalar loss"),
        ({"softcap": -1.0}, "softcap must be a positive number"),
    ):
        with pytest.raises(ValueError, match=words):
            DistillationPipelineLoss(head, head, **given)
    with pytest.raises(ValueError, match="function must be callable"):
        LogprobsPipelineLoss(head, 7)
