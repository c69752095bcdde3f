"""A compiled model that calls the loss: one graph, and the bits of an eager call."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.ranks import run_ranks
from vocab_parallel import (
    CCEPipelineLoss,
    VocabParallelClassifier,
    VocabParallelOptions,
    available_impls,
    in_graphs,
    linear_cross_entropy,
    score_tokens,
    token_logprobs,
)

Step = Callable[[Tensor, Tensor], Any]
VOCAB = 17


def drawn(num_rows: int = VOCAB, length: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states [2, T, 8], this rank's rows and bias, and targets, some ignored."""
    e = torch.randn(2, length, 8, requires_grad=True)
    c = torch.randn(num_rows, 8, requires_grad=True)
    bias = torch.randn(num_rows, requires_grad=True)
    targets = torch.randint(VOCAB, (2, length))
    targets[:, 1] = -100
    return e, c, bias, targets


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [tensor for result in results for tensor in flat(result)]


def results_and_gradients(step: Step, e: Tensor, targets: Tensor, *leaves: Tensor) -> list[Tensor]:
    results = flat(step(e, targets))
    total = sum(result.square().sum() for result in results if result.requires_grad)
    assert isinstance(total, Tensor)
    return [*results, *torch.autograd.grad(total, (e, *leaves))]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all(
        torch.equal(a, b) and (a.dtype, a.requires_grad) == (b.dtype, b.requires_grad)
        for a, b in pairs
    )


def check_step(step: Step, e: Tensor, targets: Tensor, *leaves: Tensor, backend: Any) -> None:
    """Compare a step in one graph with the same step without."""
    torch.compiler.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    found = results_and_gradients(compiled, e, targets, *leaves)
    assert same(found, results_and_gradients(step, e, targets, *leaves))


def counting() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("aot_eager")


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 1, "return_metrics": True},
        {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0},
        {"reduction": "none", "shift": 2, "return_lse": True, "return_metrics": True},
        {"num_valid_tokens": 7, "backward": "probs", "temperature": 0.7, "logits_dtype": "float32"},
        {"num_valid_tokens": torch.tensor(7), "token_weight": torch.rand(2, 6)},
        {"impl": "reference", "shift": 1, "document_ids": torch.arange(12).view(2, 6) // 4},
        {
            "num_valid_tokens": torch.tensor(7),
            "token_weight": torch.rand(2, 6),
            "document_ids": torch.arange(12).view(2, 6) // 4,
        },
    ],
)
def test_loss_in_one_graph(options: dict[str, Any]) -> None:
    e, c, bias, targets = drawn()

    def step(e: Tensor, targets: Tensor) -> Any:
        return linear_cross_entropy(torch.tanh(e), c, targets, bias, **options)

    backend = counting()
    check_step(step, e, targets, c, bias, backend=backend)
    assert (backend.frame_count, in_graphs._waiting) == (1, {})


def test_relatives_in_one_graph() -> None:
    """Log-probabilities, a schedule's loss over a classifier's rows, autocast, frozen rows."""
    e, c, bias, targets = drawn()
    head = VocabParallelClassifier(8, VOCAB, group=None)
    pipeline_loss = CCEPipelineLoss(head)

    def logprobs(e: Tensor, targets: Tensor) -> Any:
        return token_logprobs(e, c, targets, bias, shift=1, return_entropy=True)

    def autocast(e: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(torch.tanh(e), c, targets, bias, backward="probs")

    check_step(logprobs, e, targets, c, bias, backend="eager")
    check_step(autocast, e, targets, c, bias, backend="aot_eager")
    check_step(lambda e, t: pipeline_loss(head(e), t), e, targets, backend="aot_eager")
    frozen = c.detach()
    check_step(lambda e, t: linear_cross_entropy(e, frozen, t), e, targets, backend="aot_eager")


def test_inductor() -> None:
    """Two losses of hidden states that torch's compiler makes again in backward."""
    if available_impls()["torch_compile"] != "ready":
        pytest.skip(available_impls()["torch_compile"])
    e, c, bias, targets = drawn()

    def step(e: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hidden = e.relu() + 1.0
        first = linear_cross_entropy(hidden, c, targets, bias, reduction="sum")
        return first, linear_cross_entropy(hidden.neg(), c, targets, reduction="none")

    check_step(step, e, targets, c, bias, backend="inductor")


def test_what_changes_between_calls() -> None:
    """Shapes, options and rows make other graphs; a divisor that changes makes one for all."""
    e, c, _, targets = drawn()
    targets = targets.clamp(max=15)
    given: dict[str, Any] = {"vocab_parallel_options": VocabParallelOptions(0, 17, None, True, 17)}

    def step(e: Tensor, targets: Tensor) -> Any:
        return linear_cross_entropy(e, c, targets, **given)

    backend = counting()
    compiled = torch.compile(step, backend=backend, fullgraph=True)

    def check(e: Tensor, targets: Tensor) -> int:
        expected = results_and_gradients(step, e, targets, c)
        assert same(results_and_gradients(compiled, e, targets, c), expected)
        return backend.frame_count

    torch.compiler.reset()
    assert check(e, targets) == 1
    for length in (5, 1, 0, 6):
        check(e[:, :length].detach().requires_grad_(), targets[:, :length])
    torch.compiler.reset()
    values = (1.0, 2.0, 3.0)
    losses = []
    for given["temperature"] in values:
        check(e, targets)
        losses.append(float(compiled(e, targets).detach()))
    assert len(set(losses)) == len(values)
    given["vocab_parallel_options"] = VocabParallelOptions(0, 17, None, True, 16)
    check(e, targets)
    assert float(compiled(e, targets).detach()) not in losses
    torch.compiler.reset()
    counts = []
    for given["num_valid_tokens"] in (5, 6, 7, 8, 9):
        counts.append(check(e, targets))
    assert counts[1] == counts[-1], "a number of tokens is no other graph"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_nothing_is_left_behind(backend: str) -> None:
    e, c, _, targets = drawn()

    def step(e: Tensor, targets: Tensor) -> Any:
        return linear_cross_entropy(torch.tanh(e), c, targets, backward="probs")

    torch.compiler.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    first, second = compiled(e, targets), compiled(2 * e, targets)
    assert len(in_graphs._waiting) == 2
    del second  # whose backward is not run
    gc.collect()
    assert len(in_graphs._waiting) == 1
    once = torch.autograd.grad(first, (e, c), retain_graph=True)
    again = torch.autograd.grad(first, (e, c))
    assert same(list(again), list(once))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(first, (e, c))
    with torch.no_grad():
        assert torch.equal(compiled(e, targets), step(e, targets))
    assert in_graphs._waiting == {}


def test_an_activation_that_was_written_over() -> None:
    """What forward saved of the caller's tensors is read from backward's arguments."""
    e, c, _, targets = drawn()
    text = "{'function': 'linear_cross_entropy', 'backward': 'recompute'}"
    written = e.detach().clone()
    call = torch.ops.vocab_parallel
    _, ticket = call.loss(written, c, targets, None, [None] * 3, None, [True, True, False], text)
    written.fill_(torch.nan)
    leaves = [e.detach(), c.detach(), None]
    found = call.loss_backward(ticket, [torch.ones(())], leaves, [True, True, False])
    expected = torch.autograd.grad(
        linear_cross_entropy(e, c, targets, backward="recompute"), (e, c)
    )
    assert same(found, list(expected))
    with pytest.raises(RuntimeError, match="hooks on saved tensors"):
        call.loss_backward(ticket + 1, [torch.ones(())], leaves, [True, True, False])


def test_errors_are_those_of_an_eager_call() -> None:
    e, c, _, targets = drawn()
    for options, words in (
        ({"reduction": "average"}, "unknown reduction"),
        ({"shift": 9}, "shift"),
        ({"sofcap": 3.0}, "did you mean 'softcap'"),
        ({"num_valid_tokens": 1.5}, "num_valid_tokens"),
    ):
        torch.compiler.reset()

        def step(e: Tensor, options: Any = options) -> Any:
            return linear_cross_entropy(e, c, targets, **options)

        with pytest.raises(ValueError, match=words):
            torch.compile(step, backend="eager", fullgraph=True)(e)


def test_calls_that_are_no_operator() -> None:
    """Functions that have none, by keywords alone; and what no eager call would take."""
    e, c, bias, targets = drawn()

    def scores(e: Tensor) -> Any:
        return score_tokens(e=e, c=c, targets=targets)

    torch.compiler.reset()
    assert torch.equal(torch.compile(scores, backend="eager")(e).nll, scores(e).nll)
    for args, options, words in (
        ((c, targets, bias, -100, None, "mean", 0, False, True), {}, "positional"),
        ((c, targets), {"e": e}, "multiple values"),
        ((c,), {}, "'targets'"),
    ):

        def step(e: Tensor, args: Any = args, options: Any = options) -> Any:
            return linear_cross_entropy(e, *args, **options)

        torch.compiler.reset()
        with pytest.raises(TypeError, match=words):
            torch.compile(step, backend="eager")(e)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_is_no_operator_breaks_the_graph_once() -> None:
    e, c, _, targets = drawn()
    backend = counting()

    def step(e: Tensor) -> Tensor:
        return 2.0 * linear_cross_entropy(torch.tanh(e), c, targets, accumulate_into="grad")

    torch.compiler.reset()
    torch.compile(step, backend=backend)(e).backward()
    assert backend.frame_count == 2, "one graph before the loss, one after"
    found: Any = [e.grad, c.grad]
    c.grad = e.grad = None
    step(e).backward()
    assert same(found, [e.grad, c.grad])  # type: ignore[list-item]
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, backend="eager", fullgraph=True)(e)

    def slope(c: Tensor) -> Any:  # nor is it under a transform, which the loss has no rule for
        return torch.func.jvp(lambda c: linear_cross_entropy(e, c, targets), (c,), (c,))

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(slope, backend="eager", fullgraph=True)(c.detach())


def check_ranks() -> None:
    torch.manual_seed(0)
    group = dist.new_group([0, 1])
    options = VocabParallelOptions.from_vocab(VOCAB, group)
    _, c, bias, _ = drawn(options.stop - options.start)
    torch.manual_seed(1)
    e, _, _, targets = drawn()
    given: dict[str, Any] = {"vocab_parallel_options": options}

    def several(e: Tensor, targets: Tensor) -> Any:
        hidden = torch.tanh(e)
        with torch.no_grad():  # its collectives are called, though nobody uses it
            linear_cross_entropy(hidden, c, targets, bias, **given)
        each = linear_cross_entropy(
            hidden, c, targets, bias, reduction="none", shift=1, return_lse=True, **given
        )
        return each, token_logprobs(hidden, c, targets, hidden_layout="sharded", **given)

    check_step(several, e, targets, c, bias, backend="aot_eager")

    def loss(e: Tensor, targets: Tensor) -> Any:
        return linear_cross_entropy(e, c, targets, vocab_parallel_options=options)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    wrong = targets + VOCAB * dist.get_rank()
    with pytest.raises(ValueError, match="on rank 1 of the vocab group"):
        compiled(e, wrong)
    # One rank runs the graph and another does not.
    expected = results_and_gradients(loss, e, targets, c)
    mixed = compiled if dist.get_rank() else loss
    assert same(results_and_gradients(mixed, e, targets, c), expected)
    # The options of another group of the same ranks, once the first is gone.
    dist.destroy_process_group(group)
    options = VocabParallelOptions.from_vocab(VOCAB, dist.new_group([0, 1]))
    assert same(results_and_gradients(compiled, e, targets, c), expected)
    options = VocabParallelOptions.from_vocab(VOCAB, None)
    assert same(results_and_gradients(compiled, e, targets, c), expected)
    assert in_graphs._waiting == {}


def test_two_ranks() -> None:
    run_ranks(check_ranks, 2, timeout=110)
