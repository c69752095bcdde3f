"""What cannot be right where all stages carry the vocabulary, said on every rank before it hangs.

Between the first and the last action of a step no rank may raise: the others would wait for it. So
all that a user can get wrong is found, and agreed on, before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from stage_groups import StageGroups
from vocab_parallel.agreement import RankSummary, agree
from vocab_parallel.collectives import VocabGroup
from vocab_parallel.layout import target_digest
from vocab_parallel.modules.classifier import VocabParallelClassifier
from vocab_parallel.modules.embedding import VocabParallelEmbedding
from vocab_parallel.modules.vocab_rows import VocabRows
from vocab_parallel.pipeline.pipeline_loss import CCEPipelineLoss
from vocab_parallel.pipeline.problems import DIVIDED_TWICE, check_loss, check_stages
from vocab_parallel.pipeline.spanning.owners import Owners
from vocab_parallel.pipeline.spanning.passes import LossInputs, barriers_of
from vocab_parallel.settings import check_token_divisor

SCHEDULES = ("1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble")
_STAGES_OF_A_RANK = {"1F1B": 1, "ZBVZeroBubble": 2}  # of the others any number
_IMPLS = ("auto", "chunked", "reference")
_ALIKE = ("schedule", "n_microbatches", "barriers", "scale_grads")
_UNWRAPPED = (
    "does not see the gradients that the schedule itself adds to the rows: leave it out, and "
    "reduce the gradients over the data group after the step"
)


@dataclass(frozen=True)
class ScheduleArguments:
    """What a rank gives a `SpanningSchedule`; its constructor explains each."""

    stages: list[Any]
    n_microbatches: int
    loss: Any
    groups: Any
    schedule: str
    embedding: Any
    barriers: int | None
    scale_grads: bool


def agree_on_schedule(given: ScheduleArguments) -> None:
    """Refuse on every rank what cannot be right on one; all ranks of the pipeline call.

    Communicates what `agree` does, over the vocab group.

    Raises:
        ValueError: groups whose vocab group is not that of all stages (on the ranks that were
            given them); an unknown schedule, or one that cannot span; a loss that is no
            `CCEPipelineLoss`, or whose options cannot be; rows that are no parameters of exactly
            one stage of the rank, or of another group; and what `validate_pipeline_loss` refuses.
    """
    groups = given.groups
    if not isinstance(groups, StageGroups) or groups.message_groups is None:
        raise ValueError("groups must be built with vocab_over='all_stages' (build_stage_groups)")
    problem: ValueError | None = None
    claim, alike = RankSummary(), dict[str, Any]()
    try:
        _check_schedule(given)
        check_stages(given.stages, given.scale_grads, _UNWRAPPED)
        # Our passes accumulate by themselves, whichever half autograd runs.
        check_loss(given.loss, given.scale_grads, splits=False)
        _check_rows("classifier", given.loss.output_weight.owner, VocabParallelClassifier, given)
        for stage in given.stages:
            given.loss.output_weight.check_vocab_size(stage.submod)
        if given.embedding is not None:
            _check_rows("embedding", given.embedding, VocabParallelEmbedding, given)
        _check_ends(given)
        rows = given.loss.output_weight.owner
        claim, alike = RankSummary(rows.start, rows.stop, rows.vocab_size), _alike(given)
    except ValueError as error:
        problem = error
    agree(problem, claim, alike, VocabGroup.of(groups.vocab_group))


def _check_schedule(given: ScheduleArguments) -> None:
    """Check what is asked of the schedule, and of the loss."""
    number = len(given.stages)
    if given.schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {list(SCHEDULES)}, got {given.schedule!r}")
    needed = _STAGES_OF_A_RANK.get(given.schedule, max(number, 1))
    if number != needed:
        raise ValueError(f"a rank's stages must be {needed} under {given.schedule}, got {number}")
    stage = given.stages[0]
    on_cpu = torch.device(stage.device).type == "cpu"
    if given.schedule == "ZBVZeroBubble" and on_cpu and not hasattr(PipelineStage, "_is_same_rank"):
        raise ValueError(
            f"ZBVZeroBubble on a CPU needs torch 2.13 or newer, since gloo sends no message from a "
            f"rank to itself, got {torch.__version__}"
        )
    if not isinstance(given.n_microbatches, int) or given.n_microbatches < 1:
        raise ValueError(f"n_microbatches must be an int of at least 1, got {given.n_microbatches}")
    if stage.group_size != given.groups.pipeline_degree:
        raise ValueError(
            f"the stages must be of group=groups.pipeline_group, {given.groups.pipeline_degree} "
            f"ranks, got a group of {stage.group_size}"
        )
    if not isinstance(given.loss, CCEPipelineLoss):
        kind = type(given.loss).__name__
        raise ValueError(f"every rank's loss_fn must be a CCEPipelineLoss of its rows, got {kind}")
    settings = given.loss.settings
    for name, wrong in (
        ("shift", settings.num_heads is not None),
        ("hidden_layout", settings.hidden_layout == "sequence"),
        ("impl", settings.impl not in _IMPLS),
    ):
        if wrong:
            raise ValueError(
                f"a loss over all stages does not take {name}={getattr(settings, name)!r}: leave "
                f"it out, or give the vocabulary to the last stage alone"
            )
    if given.barriers not in (None, 1, 2):
        raise ValueError(f"barriers must be 1, 2 or None, got {given.barriers!r}")
    if given.barriers == 1 and barriers_of(settings) == 2:
        raise ValueError("label_smoothing needs barriers=2, or None for what the loss needs, got 1")


def _check_rows(name: str, module: Any, kind: type[VocabRows], given: ScheduleArguments) -> None:
    """Check this rank's rows of the classifier or the embedding."""
    if not isinstance(module, kind):
        raise ValueError(
            f"the {name} over all stages must be a {kind.__name__}, got {type(module).__name__}"
        )
    group = VocabGroup.of(module.group)
    if group.degree != given.groups.vocab_degree or group.rank != given.groups.vocab_rank:
        raise ValueError(
            f"the {name} must be built with group=groups.vocab_group, {given.groups.vocab_degree} "
            f"ranks, but its rows are those of a group of {group.degree} ranks"
        )
    rows = list(module.row_parameters())
    if any(isinstance(each, DTensor) or not isinstance(each, nn.Parameter) for each in rows):
        raise ValueError(f"the {name}'s rows must be plain parameters of it, and no DTensors")
    owners = [
        stage.stage_index
        for stage in given.stages
        if any(each is own for each in rows for own in stage.submod.parameters())
    ]
    if rows and len(owners) != 1:
        raise ValueError(
            f"the {name}'s rows must be parameters of exactly one stage's module of each rank, "
            f"which scales their gradient once, but they are of the stages {owners}"
        )


def _check_ends(given: ScheduleArguments) -> None:
    """Check what the classifier may not have, alone and beside the embedding."""
    classifier, embedding = given.loss.output_weight.owner, given.embedding
    if classifier.low_rank is not None:
        raise ValueError(
            "the classifier has an adapter: merge it, or give the last stage alone the vocabulary"
        )
    if embedding is None:
        return
    if embedding.hidden_size != classifier.hidden_size:
        raise ValueError(
            f"embedding and classifier must have one hidden size, that of one model, got "
            f"{embedding.hidden_size} and {classifier.hidden_size}"
        )
    if embedding.weight is classifier.weight and given.loss.accumulate_into == "main_grad":
        raise ValueError(
            'accumulate_into="main_grad" leaves a tied embedding\'s gradient in .grad: leave it out'
        )


def _alike(given: ScheduleArguments) -> dict[str, Any]:
    """Name what must be equal on all ranks, in words."""
    classifier, embedding = given.loss.output_weight.owner, given.embedding
    rows = {
        f"vocabulary, hidden size, dtypes and requires_grad of the {name}": (
            module.vocab_size,
            module.hidden_size,
            [(str(own.dtype), own.requires_grad) for own in module.parameters()],
        )
        for name, module in (("classifier", classifier), ("embedding", embedding))
        if module is not None
    }
    return {
        **{name: getattr(given, name) for name in _ALIKE},
        "stages a rank": len(given.stages),
        "tied": embedding is not None and embedding.weight is classifier.weight,
        **rows,
        **{f"{name} of the loss": value for name, value in vars(given.loss.settings).items()},
    }


class StepCall(NamedTuple):
    """What ``step`` of a `SpanningSchedule` was given, which explains each."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    loss_kwargs: dict[str, Any] | None
    arg_mbs: Any
    kwarg_mbs: Any
    target_mbs: Any

    @property
    def is_split(self) -> bool:
        """Whether inputs or labels are those of each microbatch."""
        return any(each is not None for each in (self.arg_mbs, self.kwarg_mbs, self.target_mbs))

    def joined(self, given: ScheduleArguments) -> tuple[tuple[Tensor, ...], Tensor]:
        """Join what is split: return (ids,) where every rank embeds, and the labels, [B, T].

        Raises:
            ValueError: inputs of the whole batch too; no M tuples, dicts or tensors; or tensors
                that make no batch.
        """
        if self.args or self.kwargs or self.target is not None:
            raise ValueError(
                "step takes a batch, or arg_mbs, kwarg_mbs and target_mbs of its microbatches, "
                "and was given both: leave one out"
            )
        count, spans = given.n_microbatches, given.embedding is not None
        for name, every, kind, needed in (
            ("arg_mbs", self.arg_mbs, tuple, spans),
            ("kwarg_mbs", self.kwarg_mbs, dict, False),
            ("target_mbs", self.target_mbs, Tensor, True),
        ):
            if every is None and not needed:
                continue
            got = [type(one).__name__ for one in every] if isinstance(every, list) else type(every)
            right = isinstance(got, list) and len(every) == count
            if not right or not all(isinstance(one, kind) for one in every):
                raise ValueError(
                    f"every rank needs {name} as a list of {count} {kind.__name__}s, one a "
                    f"microbatch, got {got}"
                )
        named = {"labels (target_mbs)": self.target_mbs}
        if spans:
            if not all(len(one) == 1 and isinstance(one[0], Tensor) for one in self.arg_mbs):
                raise ValueError("each of arg_mbs must be (ids [b, T],) and nothing else")
            named["ids (arg_mbs)"] = [ids for (ids,) in self.arg_mbs]
        for name, tensors in named.items():
            kinds = {(tuple(one.shape), one.dtype, one.device) for one in tensors}
            if len(kinds) > 1 or not tensors[0].dim():
                raise ValueError(
                    f"the {name} must be [b, T] each, of one shape, dtype and device, got {kinds}"
                )
        labels, *ids = (torch.cat(tensors) for tensors in named.values())
        return tuple(ids), labels


@dataclass(frozen=True)
class StepInputs:
    """What every rank needs of a step's inputs.

    Attributes:
        target: [B, T], this column's labels.
        loss: what the loss needs.
        ids: [n b, T] of all columns, of each microbatch, where the embedding spans too; else None.
        shapes: of this rank's labels, and of all else that the step was given.
        changed: whether they are others than those known, on any rank; known only where it was
            agreed on.
    """

    target: Tensor
    loss: LossInputs
    ids: list[Tensor] | None
    shapes: list[Any]
    changed: bool


def step_inputs(
    given: ScheduleArguments,
    last: Owners,
    call: StepCall,
    *,
    trains: bool,
    known: list[Any] | None,
) -> StepInputs:
    """Return what a step needs, gathered over the columns; all ranks of all stages call.

    On a CPU, where no shapes are known and where the labels have another one, it agrees over all
    ranks that all is right, which waits for a GPU.

    Args:
        given: of the schedule.
        last: the last stage's ranks.
        call: what ``step`` was given.
        trains: whether a backward follows.
        known: the shapes of the step before, if there was one.

    Raises:
        ValueError: on every rank where it agrees.
    """
    loss, group = given.loss, VocabGroup.of(given.groups.vocab_group)
    divisor = (call.loss_kwargs or {}).get("num_valid_tokens", loss.num_valid_tokens)
    validate = known is None or loss.output_weight.tensors[0].is_cpu
    problem: ValueError | None = None
    shapes, tensors = list[Any](), list[Tensor]()
    claim, alike = RankSummary(), dict[str, Any]()
    try:
        args, target = call.joined(given) if call.is_split else (call.args, call.target)
        leaves = tree_leaves((call.args, call.kwargs, call.arg_mbs, call.kwarg_mbs))
        shapes = [getattr(each, "shape", None) for each in (target, *leaves)]
        # The labels' shape changes on all ranks; where there are no labels, others do not agree.
        validate |= known is not None and shapes[0] not in (None, known[0])
        tensors = _checked_tensors(given, args, target, call.loss_kwargs)
        _check_first_inputs(given, call, leaves)
        check_token_divisor(divisor, target, loss.settings.reduction, reads_values=validate)
        if divisor is not None and given.scale_grads:
            raise ValueError(DIVIDED_TWICE)
        if validate:
            claim, alike = _claimed(given, tensors, divisor, trains)
    except ValueError as error:
        problem = error
    if validate:
        agree(problem, claim, alike, group)
    elif problem is not None:
        raise problem
    of_all = [last.gather_columns(own) for own in tensors]
    changed = False
    if validate:
        told = group.exchange_integers([shapes != known, *map(target_digest, of_all)])
        changed = bool(told[:, 0].any())
        if (told[:, 1:] != told[0, 1:]).any():
            raise ValueError(
                f"the ranks of a column, and of all columns that are replicated, must be given the "
                f"same ids and labels, but their checksums are {told[:, 1:].tolist()}"
            )
    # [n B, T] of all columns, in microbatches [n b, T]
    cut = [own.unflatten(0, (last.parts, given.n_microbatches, -1)) for own in of_all]
    labels, *ids = ([each.flatten(0, 1) for each in own.unbind(1)] for own in cut)
    weight = loss.token_weight
    if weight is not None:
        weight = last.gather_columns(weight)
    of_loss = LossInputs(labels, weight, divisor)
    return StepInputs(tensors[0], of_loss, ids[0] if ids else None, shapes, changed)


def _checked_tensors(
    given: ScheduleArguments, args: Sequence[Any], target: Any, loss_kwargs: dict[str, Any] | None
) -> list[Tensor]:
    """Check this rank's inputs of a step; return its labels [B, T], and ids where it needs them."""
    known = {"num_valid_tokens"}
    if loss_kwargs and set(loss_kwargs) - known:
        raise ValueError(f"loss_kwargs has {sorted(loss_kwargs)}: known is {sorted(known)}")
    named = {"the labels (target=)": target}
    if given.embedding is not None:
        if len(args) != 1:
            raise ValueError(
                f"every rank looks up its rows of the embedding: give step the ids [b, T] of its "
                f"column and nothing else by position, got {len(args)} arguments"
            )
        named["the ids"] = args[0]
    device, count = given.loss.output_weight.tensors[0].device, given.n_microbatches
    for name, tensor in named.items():
        got = type(tensor).__name__
        if isinstance(tensor, Tensor):
            got = f"{list(tensor.shape)} in {tensor.dtype} on {tensor.device}"
            right = tensor.dtype in (torch.int32, torch.int64) and tensor.device == device
            if right and tensor.dim() > 1 and tensor.numel() and not tensor.shape[0] % count:
                continue
        raise ValueError(
            f"every rank needs {name} of its column, [b, T] of int32 or int64 on {device} with b a "
            f"multiple of {count} microbatches, got {got}"
        )
    shift = given.loss.settings.shift
    if not 0 <= shift < target.shape[-1]:
        raise ValueError(f"shift={shift} needs sequences that are longer, got {target.shape[-1]}")
    weight = given.loss.token_weight
    wanted = [target.shape[0] // count, *target.shape[1:]]
    if weight is not None and list(weight.shape) != wanted:
        raise ValueError(
            f"token_weight must be {wanted}, as a microbatch's labels, got {list(weight.shape)}"
        )
    return list(named.values())


def _check_first_inputs(given: ScheduleArguments, call: StepCall, leaves: Sequence[Any]) -> None:
    """Check that the first stage has inputs, and that a batch makes equal microbatches."""
    if any(stage.is_first for stage in given.stages) and all(each is None for each in leaves):
        raise ValueError("give step the inputs of the first stage on its ranks, got none")
    batch = () if call.is_split else leaves
    sizes = [each.shape[0] for each in batch if isinstance(each, Tensor) and each.dim()]
    count = given.n_microbatches
    if any(size % count or not size for size in sizes):
        raise ValueError(
            f"inputs of the stages must be tensors [b, ...] with b a multiple of {count} "
            f"microbatches, got b of {sizes}"
        )


def _claimed(
    given: ScheduleArguments, tensors: Sequence[Tensor], divisor: Any, trains: bool
) -> tuple[RankSummary, dict[str, Any]]:
    """Return what this rank says of its rows, labels and ids, and what all ranks must have."""
    options, (labels, *ids) = given.loss.output_weight.read().options, tensors
    ignored = labels.long() == given.loss.settings.ignore_index
    tokens = [labels.masked_fill(ignored, 0), *ids]  # 0 is a token of every vocabulary
    ends = torch.cat([each.flatten() for each in tokens]).aminmax()
    claim = RankSummary(options.start, options.stop, options.vocab_size, *map(int, ends))
    return claim, {
        "shape of the labels": list(labels.shape),
        "dtype of the labels": labels.dtype,
        "shape of the ids": [list(each.shape) for each in ids],
        "num_valid_tokens": divisor.tolist() if isinstance(divisor, Tensor) else divisor,
        "training": trains,
    }


def agree_on_shapes(
    stages: Sequence[Any], labels: Tensor, given: ScheduleArguments, last: Owners
) -> Tensor:
    """Return a tensor without memory, as the last stage's hidden states are; all ranks call.

    Communicates one small object a rank, and waits for it.

    Args:
        stages: of this rank, whose shapes torch has inferred.
        labels: [n b, T] of a microbatch.
        given, last: of the schedule.

    Raises:
        ValueError: on every rank, hidden states that do not fit labels or rows.
    """
    own = next((_hidden_of(stage) for stage in stages if stage.is_last), None)
    told = VocabGroup.of(given.groups.vocab_group).exchange_objects(own)
    known = sorted({each for each in told if each is not None}, key=str)
    shape, dtype = known[0]
    rows = given.loss.output_weight.read().weight
    wanted = (labels.shape[0] // last.parts, *labels.shape[1:], rows.shape[1])
    casts = torch.is_autocast_enabled(rows.device.type)
    if len(known) > 1 or shape != wanted or (dtype != rows.dtype and not casts):
        raise ValueError(
            f"the last stage must return hidden states {list(wanted)} in {rows.dtype}, but returns "
            f"{'; '.join(f'{list(one)} in {kind}' for one, kind in known)}: give step inputs and "
            f"labels of one length"
        )
    return torch.empty((), dtype=dtype, device=labels.device).expand(shape)


def _hidden_of(stage: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Return what a stage knows of its first output's shape and dtype."""
    known = getattr(stage, "_stage_meta", None)  # since torch 2.13
    outputs = stage.get_outputs_meta() if known is None else known.outputs
    return tuple(outputs[0].shape), outputs[0].dtype
