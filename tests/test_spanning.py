"""A pipeline whose every rank carries rows of the vocabulary, against one process in float64."""

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from stage_groups import StageGroups, build_stage_groups
from tests.oracle import metrics_oracle, oracle, relative_error
from tests.ranks import rank_device, run_ranks
from tests.recording import CollectiveRecorder
from vocab_parallel import (
    CCEPipelineLoss,
    SpanningSchedule,
    VocabParallelClassifier,
    VocabParallelEmbedding,
    clip_grad_norm_,
    count_valid_tokens,
    no_loss,
    validate_pipeline_loss,
)
from vocab_parallel.pipeline.spanning.owners import Owners, VocabMessages
from vocab_parallel.pipeline.spanning.passes import LossInputs, LossPasses, barriers_of

HIDDEN, LENGTH, RANKS = 6, 5, 4
V_SHAPED = ("ZBVZeroBubble",)
SCALE = 1.5  # of the embeddings


class Stage(nn.Module):
    """A stage of the toy; the rank's rows are registered in one of its stages."""

    def __init__(self, whole: nn.ModuleDict, index: int, spans: bool, **rows: nn.Module) -> None:
        super().__init__()
        self.embedding = whole["embedding"] if index == 0 and not spans else None
        self.layer = whole[f"layer{index}"]
        self.rows = nn.ModuleDict(rows)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs if self.embedding is None else SCALE * self.embedding(inputs)
        return torch.tanh(self.layer(hidden))


def toy(case: dict[str, Any], num_stages: int) -> nn.ModuleDict:
    torch.manual_seed(0)
    vocabulary = case["vocabulary"]
    layers = {f"layer{i}": nn.Linear(HIDDEN, HIDDEN) for i in range(num_stages)}
    head = nn.Linear(HIDDEN, vocabulary, bias=case.get("bias", False))
    whole = nn.ModuleDict({"embedding": nn.Embedding(vocabulary, HIDDEN), **layers, "head": head})
    if case.get("embedding") == "tied":
        whole["embedding"].weight = head.weight
    return whole.double()


def one_process(
    case: dict[str, Any], num_stages: int, tokens: Tensor, labels: Tensor
) -> tuple[list[Tensor], nn.ModuleDict]:
    """Return the losses and the gradients of microbatches [n b, T], all columns' together."""
    whole, losses = toy(case, num_stages), []
    options = {"shift": 1, **options_of(case)}
    for name in ("backward", "memory_budget", "impl", "return_metrics"):  # how, not what
        options.pop(name, None)
    if "token_weight" in options:  # every column's
        options["token_weight"] = options["token_weight"].repeat(tokens.shape[1] // 2, 1)
    if case.get("whole_step"):
        ignored = options.get("ignore_index", -100)
        options["num_valid_tokens"] = int((labels[:, :, options["shift"] :] != ignored).sum())
    for own, target in zip(tokens, labels, strict=True):
        head: Any = whole["head"]
        loss, _ = oracle(
            hidden_states(whole, num_stages, own), head.weight, target, head.bias, **options
        )
        (loss / len(tokens) if scales(case) else loss).backward()
        losses.append(loss.detach())
    return losses, whole


def hidden_states(whole: nn.ModuleDict, num_stages: int, tokens: Tensor) -> Tensor:
    hidden: Tensor = SCALE * whole["embedding"](tokens)
    for index in range(num_stages):
        hidden = torch.tanh(whole[f"layer{index}"](hidden))
    return hidden


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    """Return the loss's options; cases travel as JSON."""
    options = dict(case.get("options", {}))
    if "token_weight" in options:
        options["token_weight"] = torch.tensor(options["token_weight"], dtype=torch.float64)
    return options


def scales(case: dict[str, Any]) -> bool:
    """Whether the schedule divides gradients by the number of microbatches."""
    return not case.get("whole_step") and case.get("options", {}).get("reduction") != "sum"


class Run:
    """A case on this rank: its stages, its rows, and the schedule over all of them."""

    def __init__(self, groups: StageGroups, case: dict[str, Any]) -> None:
        self.groups, self.case = groups, case
        self.name, self.microbatches = case["schedule"], case["microbatches"]
        self.num_stages = groups.pipeline_degree * (1 if self.name == "1F1B" else 2)
        style: Any = "v" if self.name in V_SHAPED else "loop"
        self.indices = groups.stages(self.num_stages, style)
        device, spans = rank_device(), case.get("embedding")
        whole = toy(case, self.num_stages).to(device)
        rows: dict[str, nn.Module] = {
            "head": VocabParallelClassifier.from_linear(
                whole["head"], groups.vocab_group, rows=case.get("rows")
            )
        }
        embedding = None
        if spans:
            embedding = rows["embedding"] = VocabParallelEmbedding(
                HIDDEN,
                case["vocabulary"],
                group=groups.vocab_group,
                scale=SCALE,
                rows=case.get("rows"),
                device=device,
            ).double()
            if spans == "tied":
                embedding.weight = rows["head"].weight  # type: ignore[assignment]
            else:
                own = whole["embedding"].weight.detach()[embedding.start : embedding.stop]
                embedding.weight = nn.Parameter(own.clone())
        self.modules = [
            Stage(whole, i, bool(spans), **(rows if i == self.indices[0] else {}))
            for i in self.indices
        ]
        stages = [
            PipelineStage(module, i, self.num_stages, device, group=groups.pipeline_group)
            for module, i in zip(self.modules, self.indices, strict=True)
        ]
        if case.get("directions"):  # a communicator each way, as torch may have since 2.14
            ways: list[Any] = [dist.new_group() for _ in range(2)]
            for stage in stages:
                stage._downstream_group, stage._upstream_group = ways
        layout = "sharded" if case.get("columns") == "apart" else "replicated"
        self.options = options_of(case)
        if "token_weight" in self.options:
            self.options["token_weight"] = self.options["token_weight"].to(device)
        self.loss = CCEPipelineLoss(rows["head"], hidden_layout=layout, **self.options)
        self.schedule = SpanningSchedule(
            stages,
            self.microbatches,
            self.loss,
            groups,
            self.name,
            embedding=embedding,
            barriers=case.get("barriers"),
            scale_grads=scales(case),
        )
        validate_pipeline_loss(self.schedule, self.loss)

    @property
    def has_last(self) -> bool:
        return self.num_stages - 1 in self.indices

    def step(self, tokens: Tensor, labels: Tensor, *, trains: bool = True) -> list[Tensor]:
        """Run this column's [b, T]; return the losses, on ranks with the last stage."""
        losses: list[Tensor] = []
        run = self.schedule.step if trains else self.schedule.eval
        if self.case.get("whole_step"):
            columns = [self.groups.columns_group] if self.case.get("columns") == "apart" else []
            self.loss.num_valid_tokens = count_valid_tokens(
                labels,
                columns,
                shift=self.options.get("shift", 1),
                ignore_index=self.options.get("ignore_index", -100),
            )
        needs = 0 in self.indices or self.case.get("embedding")
        args, inputs = ([tokens] if needs else []), {"target": labels}
        if self.case.get("split"):  # as torchtitan gives them
            inputs = {
                "arg_mbs": [(own,) for own in tokens.chunk(self.microbatches)] if needs else None,
                "kwarg_mbs": [{} for _ in range(self.microbatches)],
                "target_mbs": list(labels.chunk(self.microbatches)),
            }
            args = []
        run(
            *args,
            **inputs,
            losses=losses if self.has_last else None,
            return_outputs=False,
        )
        return [loss.detach() for loss in losses]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name each parameter as in the whole model."""
        return {
            key.replace("layer", f"layer{i}").removeprefix("rows."): parameter
            for module, i in zip(self.modules, self.indices, strict=True)
            for key, parameter in module.named_parameters()
        }


def drawn(groups: StageGroups, case: dict[str, Any], length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Draw tokens and labels [columns, M, b, T]; columns that share tokens have equal ones."""
    generator = torch.Generator().manual_seed(1)
    apart = case.get("columns") == "apart"
    columns, count = groups.column_degree if apart else 1, case["microbatches"]
    tokens = torch.randint(case["vocabulary"], (columns, count, 2, length), generator=generator)
    labels = tokens.clone()
    ignored = case.get("options", {}).get("ignore_index", -100)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = ignored
    if count > 2:
        labels[:, 1] = ignored  # a microbatch of padding alone
    return tokens, labels


def check_case(groups: StageGroups, case: dict[str, Any]) -> None:
    """Two steps with an evaluation between, and the second bit for bit as the first."""
    run = Run(groups, case)
    tokens, labels = drawn(groups, case)
    count = case["microbatches"]
    expected_losses, expected = expected_of(run, tokens, labels)
    own = own_of(run, tokens, labels)
    left: list[Tensor] = []
    for turn in range(2):
        for parameter in run.parameters().values():
            parameter.grad = None
        with CollectiveRecorder() as recorded:
            losses = run.step(*own)
        if turn:  # the first step also tells the shape
            check_collectives(recorded, run)
        assert len(losses) == (count if run.has_last else 0)
        for loss, want in zip(losses, expected_losses, strict=False):
            assert relative_error(loss.cpu(), want, 1.0) < 1e-12, case
        sum_over_columns(run)
        check_gradients(run, expected)
        everything = tokens.flatten(0, 2), labels.flatten(0, 2)
        check_reported(run, expected, *everything)
        found = [*losses, *(p.grad.clone() for p in run.parameters().values())]
        if left:
            assert all(torch.equal(a, b) for a, b in zip(left, found, strict=True)), case
        left = found
        if not turn:
            check_evaluation(run, own, losses)
            check_reported(run, expected, *everything)
    norm = clip_grad_norm_(nn.ModuleList(run.modules), 1e9, groups)
    wanted = torch.stack([p.grad.norm() for p in expected.parameters()]).norm()
    assert relative_error(norm.cpu(), wanted) < 1e-10, case
    if "token_weight" not in run.options:  # it has one length
        check_lengths(run)


def check_lengths(run: Run) -> None:
    """Steps and evaluations may have sequences of other lengths, with and without each other."""
    for length, trains in ((LENGTH + 3, True), (LENGTH - 1, True), (LENGTH + 1, False)):
        for parameter in run.parameters().values():
            parameter.grad = None
        tokens, labels = drawn(run.groups, run.case, length)
        expected_losses, expected = expected_of(run, tokens, labels)
        losses = run.step(*own_of(run, tokens, labels), trains=trains)
        assert len(losses) == (run.microbatches if run.has_last else 0)
        for loss, want in zip(losses, expected_losses, strict=False):
            assert relative_error(loss.cpu(), want, 1.0) < 1e-12, (run.case, length)
        if trains:
            sum_over_columns(run)
            check_gradients(run, expected)
        else:
            assert all(p.grad is None for p in run.parameters().values()), run.case


def expected_of(run: Run, tokens: Tensor, labels: Tensor) -> tuple[list[Tensor], nn.ModuleDict]:
    """Return one process's losses and gradients of what was drawn."""
    every = (each.transpose(0, 1).flatten(1, 2) for each in (tokens, labels))
    return one_process(run.case, run.num_stages, *every)


def own_of(run: Run, *drawn: Tensor) -> list[Tensor]:
    """Return this column's [b, T] of what was drawn."""
    column = run.groups.column_rank if run.case.get("columns") == "apart" else 0
    return [each[column].flatten(0, 1).to(rank_device()) for each in drawn]


def sum_over_columns(run: Run) -> None:
    """Sum the gradients of what the columns replicate, where each has its own tokens."""
    if run.case.get("columns") != "apart":
        return
    for name, parameter in run.parameters().items():
        if name.startswith("layer") or (
            name.startswith("embedding.") and not run.case.get("embedding")
        ):
            dist.all_reduce(parameter.grad, group=run.groups.columns_group)


def check_reported(run: Run, expected: nn.ModuleDict, tokens: Tensor, labels: Tensor) -> None:
    """Every rank of every stage has the metrics of all columns' tokens, where it was asked to."""
    if not run.options.get("return_metrics"):
        return
    head: Any = expected["head"]
    known = {k: v for k, v in run.options.items() if k in ("softcap", "temperature", "shift")}
    want = metrics_oracle(
        hidden_states(expected, run.num_stages, tokens), head.weight, labels, head.bias,
        **{"shift": 1, **known},
    )  # fmt: skip
    for found, exact in zip(run.loss.metrics(), want, strict=True):
        assert relative_error(found.cpu(), exact) < 1e-12, (run.case, found, exact)


def check_gradients(run: Run, expected: nn.ModuleDict) -> None:
    for name, parameter in run.parameters().items():
        want = expected.get_parameter(name).grad
        module = name.partition(".")[0]
        if module in run.modules[0].rows:
            rows: Any = run.modules[0].rows[module]
            want = want[rows.start : rows.stop]
        assert relative_error(parameter.grad.cpu(), want, 1e-3) < 1e-10, (run.case, name)


def check_evaluation(run: Run, own: list[Tensor], losses: list[Tensor]) -> None:
    """An evaluation has the losses of the step, and leaves gradients as they are."""
    before = [p.grad.clone() for p in run.parameters().values()]
    with torch.no_grad(), CollectiveRecorder() as recorded:
        found = run.step(*own, trains=False)
    assert all(torch.equal(a, b) for a, b in zip(found, losses, strict=True)), run.case
    after = [p.grad for p in run.parameters().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), run.case
    names = [call.name for call in recorded.calls]
    parts = run.groups.column_degree if run.case.get("columns") == "apart" else 1
    sums = parts * run.microbatches if run.case.get("embedding") else 0
    assert names.count("reduce") + names.count("all_reduce") in (sums, sums + 1), (run.case, names)


def check_collectives(recorded: CollectiveRecorder, run: Run) -> None:
    """Of each microbatch one broadcast, one gather of statistics, one sum of dE, each a column."""
    names = [call.name for call in recorded.calls]
    groups, case = run.groups, run.case
    parts = groups.column_degree if case.get("columns") == "apart" else 1
    ends = 2 if case.get("embedding") else 1
    summed = "reduce" if parts == groups.column_degree else "all_reduce"
    assert names.count("broadcast") == ends * parts * run.microbatches, (case, names)
    assert names.count(summed) == ends * parts * run.microbatches, (case, names)


CASES: list[dict[str, Any]] = [
    *({"schedule": "1F1B", "microbatches": m, "vocabulary": 23} for m in (1, 2, 4, 8)),
    {"schedule": "1F1B", "microbatches": 5, "vocabulary": 23, "embedding": "tied", "split": True},
    {"schedule": "1F1B", "microbatches": 4, "vocabulary": 23, "embedding": "own", "barriers": 2},
    {"schedule": "Interleaved1F1B", "microbatches": 8, "vocabulary": 23, "embedding": "tied"},
    {"schedule": "LoopedBFS", "microbatches": 4, "vocabulary": 23, "embedding": "own"},
    {"schedule": "InterleavedZeroBubble", "microbatches": 8, "vocabulary": 24, "split": True,
     "directions": True},
    {"schedule": "ZBVZeroBubble", "microbatches": 8, "vocabulary": 23, "embedding": "tied",
     "rows": [0, 17, 1, 5], "directions": True},
    {"schedule": "1F1B", "microbatches": 4, "vocabulary": 9},  # a rank without rows
    {"schedule": "1F1B", "microbatches": 4, "vocabulary": 23, "bias": True, "whole_step": True,
     "options": {"softcap": 2.0, "temperature": 0.7, "z_loss": 0.01, "return_metrics": True}},
    {"schedule": "ZBVZeroBubble", "microbatches": 8, "vocabulary": 23, "bias": True,
     "options": {"softcap": 2.0, "memory_budget": 200}},
    {"schedule": "1F1B", "microbatches": 4, "vocabulary": 23, "bias": True,
     "options": {"label_smoothing": 0.1, "softcap": 2.0, "z_loss": 0.01, "return_metrics": True}},
    {"schedule": "ZBVZeroBubble", "microbatches": 8, "vocabulary": 9, "barriers": 2,
     "options": {"backward": "recompute"}, "embedding": "own"},
    {"schedule": "1F1B", "microbatches": 4, "vocabulary": 23, "options": {"backward": "probs"}},
    {"schedule": "1F1B", "microbatches": 4, "vocabulary": 23,
     "options": {"backward": "recompute", "memory_budget": 300, "softcap": 3.0}},
    {"schedule": "1F1B", "microbatches": 4, "vocabulary": 23, "options": {"impl": "reference"}},
]  # fmt: skip

COLUMN_CASES: list[dict[str, Any]] = [
    {"schedule": "1F1B", "microbatches": 4, "vocabulary": 23, "columns": "apart",
     "embedding": "tied", "whole_step": True},
    {"schedule": "1F1B", "microbatches": 3, "vocabulary": 23, "columns": "apart",
     "options": {"label_smoothing": 0.1, "return_metrics": True}},
    {"schedule": "ZBVZeroBubble", "microbatches": 4, "vocabulary": 23, "columns": "apart",
     "embedding": "own"},
    {"schedule": "1F1B", "microbatches": 4, "vocabulary": 23, "embedding": "tied"},
    {"schedule": "Interleaved1F1B", "microbatches": 4, "vocabulary": 9, "whole_step": True},
]  # fmt: skip


def drawn_cases(count: int) -> list[dict[str, Any]]:
    """Draw schedules, rows and options of the loss together, fresh ones each time."""
    draw = random.Random()
    found = []
    for _ in range(count):
        vocabulary = draw.choice((9, 23, 31))
        cuts = sorted(draw.randint(0, vocabulary) for _ in range(RANKS - 1))
        weight = [[draw.uniform(0.0, 2.0) for _ in range(LENGTH)] for _ in range(2)]
        options = {
            "label_smoothing": 0.1, "softcap": 2.0, "temperature": 0.7, "z_loss": 0.01,
            "shift": draw.choice((0, 1, 2)), "ignore_index": -7, "token_weight": weight,
            "backward": draw.choice(("recompute", "probs")), "memory_budget": 300,
            "reduction": "sum",
        }  # fmt: skip
        kept = {name: value for name, value in options.items() if draw.random() < 0.5}
        found.append(
            {
                "schedule": draw.choice(("1F1B", "Interleaved1F1B", "ZBVZeroBubble")),
                "microbatches": 4,
                "vocabulary": vocabulary,
                "bias": draw.random() < 0.5,
                "embedding": draw.choice((None, "own", "tied")),
                "barriers": draw.choice((None, 2)),
                "columns": draw.choice((None, "apart")),
                "whole_step": "reduction" not in kept and draw.random() < 0.5,
                "rows": [b - a for a, b in itertools.pairwise([0, *cuts, vocabulary])],
                "options": kept,
            }
        )
    return found


def check_all(pipeline: int, columns: int, cases: list[dict[str, Any]]) -> None:
    groups = build_stage_groups(
        pipeline, columns, device_type=rank_device().type, vocab_over="all_stages"
    )
    sends_to_itself = rank_device().type == "cpu" and not hasattr(PipelineStage, "_is_same_rank")
    for case in cases:
        if case["schedule"] in V_SHAPED and sends_to_itself:
            with pytest.raises(ValueError, match=r"ZBVZeroBubble on a CPU needs torch 2\.13"):
                Run(groups, case)
            continue
        check_case(groups, case)


def test_every_rank_carries_the_vocabulary() -> None:
    run_ranks(check_all, RANKS, timeout=110, pipeline=4, columns=1, cases=CASES)


def test_columns() -> None:
    cases = COLUMN_CASES + drawn_cases(12)
    run_ranks(check_all, RANKS, timeout=110, pipeline=2, columns=2, cases=cases)


def check_refusals() -> None:
    """Whatever one rank has wrong, every rank is told, and nothing hangs."""
    groups = build_stage_groups(2, 1, device_type="cpu", vocab_over="all_stages")
    rank, device = groups.pipeline_rank, torch.device("cpu")
    rows = VocabParallelClassifier(HIDDEN, 9, group=groups.vocab_group)
    body = nn.Linear(HIDDEN, HIDDEN)
    owner = nn.Sequential(body, rows)

    def stage_of(module: nn.Module) -> PipelineStage:
        return PipelineStage(module, rank, 2, device, group=groups.pipeline_group)

    def built(module: nn.Module = owner, *args: Any, **options: Any) -> SpanningSchedule:
        given = {"loss_fn": CCEPipelineLoss(rows), "groups": groups, **options}
        return SpanningSchedule(stage_of(module), 2, *args, **given)

    lone = VocabParallelClassifier(HIDDEN, 9, group=groups.columns_group)
    adapted = VocabParallelClassifier(HIDDEN, 9, group=groups.vocab_group)
    adapted.lora_A = nn.Parameter(torch.zeros(1, HIDDEN))
    adapted.lora_B = nn.Parameter(torch.zeros(adapted.stop - adapted.start, 1))
    embedding = VocabParallelEmbedding(HIDDEN, 9, group=groups.vocab_group)
    wrapped = nn.parallel.DistributedDataParallel(owner, process_group=groups.columns_group)
    configured: Any = nn.Sequential(owner)
    configured.config = SimpleNamespace(vocab_size=10)
    loss = CCEPipelineLoss
    mine = rank == 1  # what follows is wrong on this rank alone
    last_stage = build_stage_groups(2, 1, device_type="cpu")
    for options, message in (
        ({"groups": last_stage}, "must be built with vocab_over='all_stages'"),
        ({"schedule": "GPipe" if mine else "1F1B"}, "rank 1 .*must be one of .* got 'GPipe'"),
        ({"schedule": "Interleaved1F1B" if mine else "1F1B"}, "rank by rank they have schedule"),
        ({"schedule": "ZBVZeroBubble"}, "stages must be 2 under ZBVZeroBubble, got 1"),
        ({"loss_fn": F.cross_entropy}, "must be a CCEPipelineLoss of its rows, got function"),
        ({"loss_fn": loss(rows, hidden_layout="sequence")}, "does not take hidden_layout"),
        ({"loss_fn": loss(rows, label_smoothing=0.1), "barriers": 1}, "needs barriers=2"),
        ({"loss_fn": loss(rows, reduction="sum")}, "is not a mean over microbatches"),
        ({"loss_fn": loss(rows, z_loss=float(rank))}, "z_loss of the loss: "),
        ({"module": body} if mine else {}, "of exactly one stage's module .* stages \\[\\]"),
        ({"loss_fn": loss(lone), "module": lone}, "its rows are those of a group of 1 ranks"),
        ({"loss_fn": loss(adapted), "module": adapted}, "has an adapter"),
        ({"loss_fn": loss(nn.Linear(HIDDEN, 9))}, "must be a VocabParallelClassifier, got Linear"),
        ({"embedding": embedding}, "embedding's rows must be parameters of exactly one stage"),
        ({"module": wrapped}, "DistributedDataParallel does not see the gradients"),
        ({"barriers": 3}, "barriers must be 1, 2 or None, got 3"),
        ({"module": configured} if mine else {}, "has 9 rows, .* says vocab_size=10"),
    ):
        with pytest.raises(ValueError, match=message):
            built(**options)
    with pytest.raises(ValueError, match=r"rank 1 .*stages must be 1 under 1F1B, got 0"):
        SpanningSchedule([] if mine else stage_of(owner), 2, loss(rows), groups)

    schedule = built()
    inputs = [torch.randn(4, LENGTH, HIDDEN)] if rank == 0 else []
    labels = torch.randint(9, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    for given, message in (
        ({"target": None if mine else labels}, "needs the labels .* got NoneType"),
        ({"target": labels[:3]}, r"b a multiple of 2 microbatches, got \[3, 5\]"),
        ({"target": labels + 9 * mine}, r"targets must lie in \[0, 9\)"),
        ({"target": labels.flip(0) if mine else labels}, "must be given the same ids and labels"),
        ({"target": labels[:2] if mine else labels}, "shape of the labels: "),
        ({"target": labels, "loss_kwargs": {"num_valid_tokens": 3}}, "scale_grads=False"),
        ({"target": labels, "loss_kwargs": {"weight": 3}}, r"known is \['num_valid_tokens'\]"),
        ({"target": labels.float()}, "of int32 or int64 on cpu .* in torch.float32"),
        ({"target": labels[:, :1]}, "shift=1 needs sequences that are longer, got 1"),
        ({"target": labels[:, :3]}, "the last stage must return hidden states"),
        ({"target": labels, "target_mbs": [labels]}, "was given both: leave one out"),
        ({"target_mbs": [labels] if mine else [*labels.chunk(2)]}, r"needs target_mbs as a list "),
        ({"target_mbs": [labels[:1], labels[:2]]}, r"the labels .* of one shape, .* got \{"),
        (
            {"target_mbs": [*labels[0, :2]] if mine else [*labels.chunk(2)]},
            r"\[b, T\] each, of one",
        ),
        ({"kwarg_mbs": [{}, {}]}, r"needs target_mbs as a list of 2 Tensors, .* got .*NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule.step(*([] if "target" not in given else inputs), **given)
    uneven = [own[:3] for own in inputs]
    for wrong, message in (
        ([], "on its ranks, got none"),
        (uneven, r"b a multiple of 2 .* got b of \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule.step(*wrong, target=labels)
    check_unlike_lengths(schedule)
    undivided = built(scale_grads=False)
    with pytest.warns(UserWarning, match="the loss no num_valid_tokens"):
        undivided.step(*inputs, target=labels, losses=[], return_outputs=False)
    undivided.step(*inputs, target=labels, losses=[], return_outputs=False)  # it is said once
    given = torch.zeros(2, LENGTH, HIDDEN)
    fixed = PipelineStage(
        owner, rank, 2, device, input_args=given, output_args=given, group=groups.pipeline_group
    )
    check_unlike_lengths(SpanningSchedule(fixed, 2, loss(rows), groups))
    # The same rows under a schedule whose last stage alone calls the loss would never come.
    plain = Schedule1F1B(stage_of(owner), n_microbatches=2, loss_fn=loss(rows) if mine else no_loss)
    with pytest.raises(ValueError, match="let all stages carry the vocabulary with SpanningSched"):
        validate_pipeline_loss(plain, plain._loss_fn)
    with pytest.raises(ValueError, match="which is another one"):
        validate_pipeline_loss(schedule, loss(rows))
    embeds = built(nn.ModuleList([owner, embedding]), embedding=embedding)
    with pytest.raises(ValueError, match="every rank looks up its rows of the embedding"):
        embeds.step(*([labels] if mine else []), target=labels)
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 9\)"):
        embeds.step(labels + 9, target=labels)
    halves = list(labels.chunk(2))
    with pytest.raises(ValueError, match=r"needs arg_mbs as a list of 2 tuples, .* got .*NoneType"):
        embeds.step(arg_mbs=None if mine else [(own,) for own in halves], target_mbs=halves)


def check_unlike_lengths(schedule: SpanningSchedule) -> None:
    """Inputs longer or shorter than the labels are refused everywhere, and nothing is left."""
    first = schedule._stages[0].is_first
    for length, of_labels in ((8, 5), (5, 5), (8, 5), (3, 5), (5, 8), (8, 8), (5, 5)):
        inputs = [torch.randn(4, length, HIDDEN)] if first else []
        labels = torch.randint(9, (4, of_labels), generator=torch.Generator().manual_seed(0))
        losses: list[Tensor] = []
        call = {"target": labels, "losses": None if first else losses, "return_outputs": False}
        if length == of_labels:
            schedule.step(*inputs, **call)
            assert all(bool(loss.isfinite()) for loss in losses)
            assert len(losses) == (0 if first else 2)
            continue
        message = rf"states \[2, {of_labels}, 6\] .* returns \[2, {length}, 6\] .* one length"
        with pytest.raises(ValueError, match=message):
            schedule.step(*inputs, **call)


def test_refusals() -> None:
    run_ranks(check_refusals, 2)


def alone(loss: CCEPipelineLoss) -> LossPasses:
    """Return the passes of one rank that has all rows."""
    return LossPasses(loss, Owners(VocabMessages(), 0, True), barriers_of(loss.settings))


def test_a_loss_that_is_scaled_is_refused() -> None:
    rows = VocabParallelClassifier(16, 50, group=None)
    passes = alone(CCEPipelineLoss(rows, shift=0))
    leaf = torch.randn(1, 9, 16, requires_grad=True)
    value = passes.deferred(leaf, 0)
    assert bool(value.isnan())  # nobody knows it yet
    passes.begin(LossInputs([torch.randint(50, (1, 9))]), leaf, trains=True)
    passes.broadcast(0)
    passes.statistics(0)
    passes.exchange(0)
    assert bool(value.isfinite())
    with pytest.raises(ValueError, match=r"received 2\.0"):
        (2.0 * value).backward()


def test_share_of_a_confident_token() -> None:
    """The targets' part is added in float32: no rounded probability minus one."""
    torch.manual_seed(0)
    c = torch.randn(50, 16)
    targets = torch.randint(50, (1, 9))
    e = (6.0 * c[targets] / c[targets].norm(dim=-1, keepdim=True)).bfloat16()
    rows = VocabParallelClassifier(16, 50, group=None, dtype=torch.bfloat16)
    with torch.no_grad():
        rows.weight.copy_(c)
    passes = alone(CCEPipelineLoss(rows, shift=0))
    leaf = e.clone().requires_grad_()
    value = passes.deferred(leaf, 0)
    passes.begin(LossInputs([targets]), leaf, trains=True)
    passes.broadcast(0)
    passes.statistics(0)
    passes.exchange(0)
    value.backward()
    passes.gradients(0)
    wide = [t.detach().double().requires_grad_() for t in (e, rows.weight)]
    F.cross_entropy((wide[0] @ wide[1].T)[0], targets[0]).backward()
    half = [t.detach().clone().requires_grad_() for t in (e, rows.weight)]
    F.cross_entropy(F.linear(*half)[0].float(), targets[0]).backward()
    for ours, peer, want in zip((leaf, rows.weight), half, wide, strict=True):
        assert relative_error(ours.grad, want.grad) <= 1.1 * relative_error(peer.grad, want.grad)
