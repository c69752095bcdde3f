"""The loss inside a schedule, against the same model in one process."""

import contextlib
import inspect
import types
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.nn.parallel import DistributedDataParallel

from stage_groups import StageGroups, build_stage_groups
from tests.oracle import relative_error
from tests.ranks import run_ranks
from vocab_parallel import (
    CCEPipelineLoss,
    LogprobsPipelineLoss,
    VocabParallelClassifier,
    VocabParallelOptions,
    linear_cross_entropy,
    no_loss,
    validate_pipeline_loss,
)
from vocab_parallel.split_backward import keep_graph

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


def check_one_rank_a_stage() -> None:
    groups = build_stage_groups(2, 1, device_type="cpu")
    is_last = groups.has_last_stage(2)
    torch.manual_seed(1)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    labels = tokens.clone()
    labels[1::2, 5:] = -100
    labels[2:4] = -100  # a microbatch of padding

    reference = toy_model()
    losses_expected = []
    for start in range(0, BATCH, BATCH // MICROBATCHES):
        own = slice(start, start + BATCH // MICROBATCHES)
        hidden = torch.tanh(reference["first"](reference["embedding"](tokens[own])))
        logits = reference["head"](torch.tanh(reference["second"](hidden)))
        loss = F.cross_entropy(
            logits[:, :-1].reshape(-1, VOCABULARY),
            labels[own, 1:].reshape(-1),
            reduction="sum",
        ) / max(int((labels[own, 1:] != -100).sum()), 1)
        losses_expected.append(loss.detach())
        (loss / MICROBATCHES).backward()

    for name in ("GPipe", "1F1B"):
        whole = toy_model()
        head = None
        if is_last:
            head = VocabParallelClassifier.from_linear(whole["head"], groups.vocab_group)
        stage = ToyStage(whole, groups.pipeline_rank == 0, head)
        loss = CCEPipelineLoss(head) if head is not None else print
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
            *([] if is_last else [tokens]),
            target=labels if is_last else None,
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
                expected = reference.get_parameter(
                    parameter_name.replace("layer", "second" if is_last else "first")
                ).grad
            assert relative_error(gradient, expected) < 1e-12, (name, parameter_name)


def test_one_rank_a_stage() -> None:
    """Without a vocab axis; `test_schedules.py` has the meshes."""
    run_ranks(check_one_rank_a_stage, 2)


def schedule_of(name: str, modules: list[nn.Module], loss: Any, scale_grads: bool = True) -> Any:
    stages = [
        PipelineStage(module, index, len(modules), torch.device("cpu"))
        for index, module in enumerate(modules)
    ]
    cls = get_schedule_class(name)
    single = len(modules) == 1
    return cls(
        stages[0] if single else stages, n_microbatches=2, loss_fn=loss, scale_grads=scale_grads
    )


def check_refusals() -> None:
    """One rank, which runs every stage."""
    whole = toy_model()
    head = VocabParallelClassifier.from_linear(whole["head"], None)
    first, last = ToyStage(whole, True, None), ToyStage(whole, False, head)
    shared = ToyStage(whole, False, head)
    shared.layer = first.layer
    good = CCEPipelineLoss(head)
    divided = CCEPipelineLoss(head)
    divided.num_valid_tokens = 7
    ddp = DistributedDataParallel(last)
    zero_bubble = "InterleavedZeroBubble"
    alone: list[nn.Module] = [ToyStage(whole, True, head)]
    summed = CCEPipelineLoss(head, reduction="sum")
    unowned_bias = CCEPipelineLoss(head.weight, torch.zeros(VOCABULARY))
    cases: list[tuple[str, list[nn.Module], Any, bool, str | None]] = [
        ("GPipe", [ToyStage(whole, True, None)], good, True, "is not a parameter of the last"),
        ("GPipe", alone, CCEPipelineLoss(whole["head"]), True, "is not a parameter of the last"),
        ("GPipe", alone, unowned_bias, True, "is not a parameter of the last"),
        ("GPipe", alone, F.cross_entropy, True, "must be a CCEPipelineLoss"),
        ("GPipe", alone, None, True, "loss_fn=None, .* give it no_loss"),
        ("GPipe", alone, good, True, None),
        ("GPipe", alone, CCEPipelineLoss(head.weight, head.bias), True, None),
        ("GPipe", alone, summed, True, 'reduction="sum" is not a mean'),
        ("GPipe", alone, summed, False, None),
        ("GPipe", alone, divided, True, "num_valid_tokens divides"),
        ("Interleaved1F1B", [first, shared], good, True, "shared by two stages of one rank"),
        ("Interleaved1F1B", [first, shared], good, False, None),
        ("Interleaved1F1B", [first, ddp], good, True, None),
        (zero_bubble, [first, last], good, True, None),
        (zero_bubble, [first, ddp], good, True, "DistributedDataParallel does not work under"),
        (zero_bubble, [first, last], torch.compile(good), True, "a compiled loss fails under"),
    ]
    for name, modules, loss, scale_grads, message in cases:
        schedule = schedule_of(name, modules, loss, scale_grads)
        if message is None:
            validate_pipeline_loss(schedule, loss)
        else:
            with pytest.raises(ValueError, match=message):
                validate_pipeline_loss(schedule, loss)
    with pytest.raises(ValueError, match="must be a schedule of torch"):
        validate_pipeline_loss(None, good)

    # A divisor that comes after the check is refused at the call.
    late = CCEPipelineLoss(head)
    validate_pipeline_loss(schedule_of("GPipe", [ToyStage(whole, True, head)], late), late)
    with pytest.raises(ValueError, match="build it with scale_grads=False"):
        late(torch.zeros(1, 4, HIDDEN).double(), torch.zeros(1, 4).long(), num_valid_tokens=3)
    check_optimizers(whole, head)
    check_warnings(whole, head)
    check_configurations(whole)

    # Outputs that are kept alive are warned of, once.
    tokens = torch.randint(VOCABULARY, (4, LENGTH))
    for kept in (True, False):
        loss = CCEPipelineLoss(head)
        schedule = schedule_of("GPipe", [ToyStage(whole, True, head)], loss)
        validate_pipeline_loss(schedule, loss)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                schedule.step(tokens, target=tokens, losses=[], return_outputs=kept)
        texts = [str(one.message) for one in said if "return_outputs" in str(one.message)]
        assert len(texts) == kept, texts


def check_optimizers(whole: nn.ModuleDict, head: VocabParallelClassifier) -> None:
    """Each parameter that is trained once, and no other: the whole head is not the sharded one."""
    stage, loss = ToyStage(whole, True, head), CCEPipelineLoss(head)
    schedule = schedule_of("GPipe", [stage], loss)
    own = list(stage.parameters())
    rest = [p for p in own if p is not head.weight]
    several: list[tuple[Any, str | None]] = []
    for parameters, message in (
        (own, None),
        (rest, "lacks .*, which would never change"),
        ([*own, *whole["head"].parameters()], "parameters of none of this rank's stages"),
        ([*own, own[0]], "has .* twice"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of a duplicate
            several.append((torch.optim.SGD(parameters, lr=0.1), message))
    several += [
        ([torch.optim.SGD(rest), torch.optim.AdamW([head.weight])], None),
        (iter([torch.optim.SGD(rest), torch.optim.AdamW([head.weight])]), None),
        ([torch.optim.SGD(rest), torch.optim.SGD(own)], "has .* twice"),
        ([torch.optim.SGD(rest)], "lacks .*, which would never change"),
        (stage, r"must be an optimizer of torch's, or several of them, got \['ToyStage'\]"),
    ]
    for optimizer, message in several:
        if message is None:
            validate_pipeline_loss(schedule, loss, optimizer=optimizer)
            continue
        with pytest.raises(ValueError, match=message):
            validate_pipeline_loss(schedule, loss, optimizer=optimizer)


def check_warnings(whole: nn.ModuleDict, head: VocabParallelClassifier) -> None:
    """Each is said once, before the first backward; where nothing is wrong, nothing is."""
    module = ToyStage(whole, True, head)
    tokens = torch.randint(VOCABULARY, (4, LENGTH))

    def said(loss: Any, *, validates: bool = True, scales: bool = False) -> list[str]:
        """Return what an evaluation and two steps warn of; each microbatch counts as many."""
        schedule = schedule_of("GPipe", [module], loss, scales)
        if validates:
            validate_pipeline_loss(schedule, loss)
        target = loss.load(tokens) if isinstance(loss, LogprobsPipelineLoss) else tokens
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            schedule.eval(tokens, target=target, losses=[], return_outputs=False)
            assert not caught, "an evaluation has no gradient"
            for _ in range(2):
                module.zero_grad()
                schedule.step(tokens, target=target, losses=[], return_outputs=False)
        return [str(one.message) for one in caught]

    divided = CCEPipelineLoss(head)
    divided.num_valid_tokens = 4 * (LENGTH - 1)
    assert said(divided) == []
    right = head.weight.grad
    assert right is not None
    (missing,) = said(CCEPipelineLoss(head))
    assert "as many times too large as there are microbatches" in missing
    assert relative_error(head.weight.grad, 2 * right) < 1e-12, "as it says, of two microbatches"
    assert said(CCEPipelineLoss(head), scales=True) == []
    assert relative_error(head.weight.grad, right) < 1e-12
    for loss in (
        CCEPipelineLoss(head, scaled_outside=True),
        CCEPipelineLoss(head, reduction="sum"),
    ):
        assert said(loss) == []

    functions = [
        CCEPipelineLoss(head),
        LogprobsPipelineLoss(head, lambda logprobs, entropy, batch: -logprobs.sum(), shift=1),
    ]
    for loss in functions:
        (unknown,) = said(loss, validates=False, scales=True)
        assert f"the backward of a {type(loss).__name__} that was never validated" in unknown
        assert said(loss) == [] or isinstance(loss, CCEPipelineLoss)
    hidden = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    CCEPipelineLoss(head)(hidden, tokens[:2]).backward()  # outside of a schedule nothing is amiss


def check_configurations(whole: nn.ModuleDict) -> None:
    """Fewer rows than a configuration says are no vocabulary; more may be padding."""
    rows = 12
    linear = nn.Linear(HIDDEN, rows, bias=False).double()
    sharded = VocabParallelClassifier(HIDDEN, rows, group=None, dtype=torch.float64)
    padded = VocabParallelOptions.from_vocab(9, num_rows=rows)
    all_rows = VocabParallelOptions.from_vocab(rows)
    few = f"has {rows} rows, .* says vocab_size=13"
    for head, options, size, refused, warned in (
        (linear, None, 13, few, False),
        (sharded, None, 13, few, False),
        (linear, all_rows, 13, None, False),  # whoever says so knows
        (linear, None, rows, None, False),
        (linear, None, 9, None, True),
        (sharded, None, 9, None, True),
        (linear, all_rows, 9, None, True),
        (linear, padded, 9, None, False),
        (sharded, padded, 9, None, False),
    ):
        for nested in (False, True):
            module: Any = ToyStage(whole, True, head)
            text = types.SimpleNamespace(vocab_size=size)
            module.config = types.SimpleNamespace(text_config=text) if nested else text
            loss = CCEPipelineLoss(head, vocab_parallel_options=options)
            schedule = schedule_of("GPipe", [module], loss)
            expected: Any = contextlib.nullcontext()
            if refused is not None:
                expected = pytest.raises(ValueError, match=refused)
            elif warned:
                words = rf"takes {rows} rows .*from_vocab\(9, group, num_rows={rows}\)"
                expected = pytest.warns(UserWarning, match=words)
            with expected:
                validate_pipeline_loss(schedule, loss)


def test_refusals() -> None:
    run_ranks(check_refusals, 1)


def test_fewer_rows_than_the_module_says() -> None:
    """A shard that another trainer hands over as a plain tensor is not the whole vocabulary."""
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    own = VOCABULARY // 2
    head.weight = nn.Parameter(head.weight.detach()[:own].clone())
    e, labels = torch.randn(1, 4, HIDDEN), torch.randint(own, (1, 4))
    with pytest.raises(ValueError, match=f"out_features={VOCABULARY} whose weight has {own} rows"):
        CCEPipelineLoss(head)(e, labels)
    options = VocabParallelOptions(0, own, vocab_size=own)  # whoever says which rows they are
    loss = CCEPipelineLoss(head, shift=0, vocab_parallel_options=options)(e, labels)
    exact = F.cross_entropy((e @ head.weight.T).flatten(0, 1), labels.flatten())
    assert torch.allclose(loss, exact)


def test_fewer_rows_than_the_heads_own_configuration_says() -> None:
    head: Any = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head.config = types.SimpleNamespace(vocab_size=2 * VOCABULARY)
    e, labels = torch.randn(1, 4, HIDDEN), torch.randint(VOCABULARY, (1, 4))
    words = f"has {VOCABULARY} rows, .* configuration of Linear says vocab_size={2 * VOCABULARY}"
    with pytest.raises(ValueError, match=words):
        CCEPipelineLoss(head)(e, labels)
    CCEPipelineLoss(head, vocab_parallel_options=VocabParallelOptions(0, VOCABULARY))(e, labels)


def check_gathered_head() -> None:
    """FSDP2 hands over the whole head: in a gathering layout the loss would be one rank's alone."""
    mesh = init_device_mesh("cpu", (2,))
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    fully_shard(head, mesh=mesh)
    e, labels = torch.randn(1, 4, HIDDEN), torch.randint(VOCABULARY, (1, 4))

    def function(logprobs: Tensor, entropy: Any, batch: dict[str, Tensor]) -> Tensor:
        return -logprobs.sum()

    losses = {
        layout: (
            CCEPipelineLoss(head, hidden_layout=layout),
            LogprobsPipelineLoss(head, function, hidden_layout=layout),
        )
        for layout in ("sharded", "sequence", "replicated")
    }
    targets = {layout: each[1].load(labels) for layout, each in losses.items()}
    head.unshard()
    for layout, each in losses.items():
        for loss, target in zip(each, (labels, targets[layout]), strict=True):
            if layout == "replicated":
                assert loss(e, target).isfinite()
                continue
            with pytest.raises(ValueError, match="whole when the loss is called"):
                loss(e, target)
    dist.barrier()


def test_gathered_head() -> None:
    run_ranks(check_gathered_head, 2)


def check_refused_everywhere() -> None:
    """A mistake on the last stage is told to every rank; a vocab group of other stages, too."""
    groups = build_stage_groups(2, 1, device_type="cpu")
    whole = toy_model()
    is_last = groups.has_last_stage(2)
    for group, message in (
        (groups.vocab_group, "on rank 1: the classifier's tensor"),
        (groups.pipeline_group, r"vocab group \[0, 1\] has ranks \[0\], which do not run the last"),
    ):
        head = VocabParallelClassifier.from_linear(whole["head"], group) if is_last else None
        owned = head if group is groups.pipeline_group else None
        stage = PipelineStage(
            ToyStage(whole, not is_last, owned), groups.pipeline_rank, 2, torch.device("cpu"),
            group=groups.pipeline_group,
        )  # fmt: skip
        loss = print if head is None else CCEPipelineLoss(head)
        schedule = get_schedule_class("GPipe")(stage, n_microbatches=2, loss_fn=loss)
        with pytest.raises(ValueError, match=message):
            validate_pipeline_loss(schedule, loss)
    check_mistakes_of_one_rank(groups)


def check_mistakes_of_one_rank(groups: StageGroups) -> None:
    """Of two stages one is wrong, the first or the last, and both raise."""
    whole, is_last = toy_model(), groups.has_last_stage(2)
    head = VocabParallelClassifier.from_linear(whole["head"], groups.vocab_group)
    module: Any = ToyStage(whole, not is_last, head if is_last else None)
    loss: Any = CCEPipelineLoss(head) if is_last else no_loss

    def built(loss: Any) -> Any:
        stage = PipelineStage(
            module, groups.pipeline_rank, 2, torch.device("cpu"), group=groups.pipeline_group
        )
        return get_schedule_class("GPipe")(stage, n_microbatches=2, loss_fn=loss)

    with pytest.raises(ValueError, match=r"on rank 0: .* loss_fn=None, .* give it no_loss"):
        validate_pipeline_loss(built(loss if is_last else None), loss)
    late = None if is_last else torch.optim.SGD(module.layer.parameters())
    for optimizer in (late, late and [late]):
        with pytest.raises(ValueError, match=r"on rank 0: the optimizer lacks embedding\.weight"):
            validate_pipeline_loss(built(loss), loss, optimizer=optimizer)
    module.config = types.SimpleNamespace(vocab_size=VOCABULARY + 1)
    with pytest.raises(ValueError, match=r"on rank 1: the classifier has 23 rows, .*=24"):
        validate_pipeline_loss(built(loss), loss)
    del module.config

    # A head that has become more than its weight, or whose options are none.
    linear = toy_model()["head"]
    hooked: Any = CCEPipelineLoss(linear) if is_last else no_loss
    hook = linear.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="on rank 1: output_weight is a Linear that has forward"):
        validate_pipeline_loss(built(hooked), hooked)
    hook.remove()
    given = types.SimpleNamespace(start=0, stop=VOCABULARY)
    told: Any = CCEPipelineLoss(head, vocab_parallel_options=given) if is_last else no_loss
    with pytest.raises(ValueError, match=r"on rank 1: .* SimpleNamespace has no group"):
        validate_pipeline_loss(built(told), told)

    # A divisor that comes between the check and the first step.
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    losses: list[Tensor] | None = [] if is_last else None
    takes_them = "loss_kwargs" in inspect.signature(get_schedule_class("GPipe").step).parameters
    for how in ("attribute", "argument") if takes_them else ("attribute",):  # torch 2.11 not
        schedule = built(loss)
        validate_pipeline_loss(schedule, loss)
        divisor = {"num_valid_tokens": BATCH * (LENGTH - 1)} if is_last else {}
        for given_divisor in (divisor, {}):
            if how == "attribute" and is_last:
                loss.num_valid_tokens = given_divisor.get("num_valid_tokens")
            kwargs = {"loss_kwargs": given_divisor} if how == "argument" else {}
            expected: Any = contextlib.nullcontext()
            if given_divisor is divisor:
                expected = pytest.raises(ValueError, match="on rank 1: num_valid_tokens divides")
            with expected:
                schedule.step(
                    *([] if is_last else [tokens]),
                    target=tokens if is_last else None, losses=losses, return_outputs=False,
                    **kwargs,
                )  # fmt: skip
        assert module.layer.weight.grad is not None
        assert not hasattr(schedule.step, "__wrapped__"), "later steps exchange nothing more"
        module.zero_grad()


def test_refused_everywhere() -> None:
    run_ranks(check_refused_everywhere, 2)


def test_graph_outlives_a_detached_loss() -> None:
    """What a torch before 2.13 needs between the halves of a backward, on any torch."""
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(torch.randn(3, 4).double(), weight, torch.tensor([0, 4, 2]))
    expected = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    node = loss.grad_fn
    keep_graph(loss)
    loss.detach_()
    assert loss.kept_graph is not node
    edge = torch.autograd.graph.GradientEdge(loss.kept_graph, 0)
    found = torch.autograd.grad(edge, weight, torch.ones_like(loss))[0]
    assert torch.equal(found, expected)
