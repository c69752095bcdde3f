"""Bad input: a ValueError on every rank of the group, and the group works on afterwards."""

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_ranks
from vocab_parallel import (
    CCEPipelineLoss,
    VocabParallelOptions,
    linear_cross_entropy,
    multi_token_cross_entropy,
    predict,
    token_logprobs,
)
from vocab_parallel import arguments as bound_calls
from vocab_parallel.arguments import Operands, prepare
from vocab_parallel.settings import LossSettings

TOKENS, HIDDEN, VOCABULARY = 6, 4, 11
Change = Callable[[dict[str, Any], int], None]


def arguments() -> dict[str, Any]:
    """Right arguments, equal on every rank but for the rows."""
    torch.manual_seed(0)
    options = VocabParallelOptions.from_vocab(VOCABULARY)
    return {
        "e": torch.randn(TOKENS, HIDDEN, requires_grad=True),
        "targets": torch.randint(VOCABULARY, (TOKENS,)),
        "c": torch.randn(options.stop - options.start, HIDDEN, requires_grad=True),
        "vocab_parallel_options": options,
    }


def setting(**values: Any) -> Change:
    def change(given: dict[str, Any], rank: int) -> None:
        given.update(values)

    return change


def on_rank(which: int, other: Change) -> Change:
    """Make the mistake on one rank alone."""

    def change(given: dict[str, Any], rank: int) -> None:
        if rank == which:
            other(given, rank)

    return change


def target(value: int) -> Change:
    def change(given: dict[str, Any], rank: int) -> None:
        given["targets"][2] = value

    return change


def reshaped(name: str, *shape: int) -> Change:
    def change(given: dict[str, Any], rank: int) -> None:
        old: Tensor = given[name]
        given[name] = torch.ones(shape, dtype=old.dtype, requires_grad=old.requires_grad)

    return change


def rows(*ranges: tuple[int, int], vocab_size: int | None = None) -> Change:
    def change(given: dict[str, Any], rank: int) -> None:
        start, stop = ranges[rank]
        given["c"] = torch.ones(stop - start, HIDDEN, requires_grad=True)
        given["vocab_parallel_options"] = VocabParallelOptions(start, stop, vocab_size=vocab_size)

    return change


def cast(name: str, dtype: torch.dtype) -> Change:
    def change(given: dict[str, Any], rank: int) -> None:
        given[name] = given[name].detach().to(dtype)

    return change


def sparse(name: str) -> Change:
    def change(given: dict[str, Any], rank: int) -> None:
        given[name] = given[name].detach().to_sparse()

    return change


def divided_by_rank(given: dict[str, Any], rank: int) -> None:
    given["num_valid_tokens"] = torch.tensor(7 + rank)


def without_reduction(given: dict[str, Any], rank: int) -> None:
    options = given["vocab_parallel_options"]
    given["vocab_parallel_options"] = replace(options, reduce_e_grad=False)


def largest(size: int) -> Change:
    def change(given: dict[str, Any], rank: int) -> None:
        options = given["vocab_parallel_options"]
        given["vocab_parallel_options"] = replace(options, largest_shard=size)

    return change


def options_with(**values: Any) -> Change:
    def change(given: dict[str, Any], rank: int) -> None:
        given["vocab_parallel_options"] = replace(given["vocab_parallel_options"], **values)

    return change


def in_two_sequences(given: dict[str, Any], rank: int) -> None:
    given["e"] = given["e"].detach().view(2, TOKENS // 2, HIDDEN).requires_grad_()
    given["targets"] = given["targets"].view(2, TOKENS // 2)


def of_two_types(given: dict[str, Any], rank: int) -> None:
    given["softcap"] = 3 if rank else 3.0


def on_meta(given: dict[str, Any], rank: int) -> None:
    for name in ("e", "c", "targets"):
        given[name] = given[name].detach().to("meta")


MISTAKES: list[tuple[Change, str]] = [
    (reshaped("c", 6, 3), "hidden size of e is 4 but that of c is 3"),
    (reshaped("c", 9, HIDDEN), r"c has 9 rows but the options say \[0, 6\)"),
    (on_rank(1, reshaped("c", 9, HIDDEN)), "rank 1 of the vocab group: c has 9 rows"),
    (largest(5), "largest_shard must be .* got 5 where this rank has 6"),
    (on_rank(1, largest(7)), r"must agree.*largest_shard: \[None, 7\]"),
    (target(VOCABULARY), r"targets must lie in \[0, 11\).* got 11"),
    (on_rank(1, target(-1)), r"targets must lie in \[0, 11\).* got -1 on rank 1"),
    (cast("targets", torch.float32), "int32 or int64, got torch.float32"),
    (cast("c", torch.float64), "each as it is, or both float64"),
    (setting(num_valid_tokens=torch.tensor(True)), "must be a number of tokens, got torch.bool"),
    (
        on_rank(1, setting(token_weight=torch.ones(TOKENS, dtype=torch.complex64))),
        "token_weight must be real, got torch.complex64",
    ),
    (on_rank(0, sparse("c")), r"c must be dense, got torch.sparse_coo: pass c.to_dense\(\)"),
    (reshaped("targets", 5), r"targets must be \[6\]"),
    (setting(shift=-1), r"shift must be an integer in \[0, 6\)"),
    (setting(shift=TOKENS), r"shift must be an integer in \[0, 6\)"),
    (on_rank(0, setting(shift=TOKENS)), "rank 0 of the vocab group: shift"),
    (setting(impl="fast"), r"unknown impl 'fast': known are \['auto', .*'chunked'"),
    (setting(reduction="avg"), r"unknown reduction 'avg': known are \['mean', 'sum', 'none'\]"),
    (setting(hidden_layout="split"), "unknown hidden_layout 'split'"),
    (setting(backward="never"), "unknown backward 'never'"),
    (setting(chunk=3), r"unknown option 'chunk': .*impl 'auto' has \['microbatches_in_flight'"),
    (setting(softcap=0), "softcap must be a positive number"),
    (setting(softcap=float("nan")), "softcap must be a positive number"),
    (setting(temperature=0.0), "temperature must be a positive number"),
    (setting(label_smoothing=1.5), r"label_smoothing must lie in \[0, 1\]"),
    (setting(z_loss=-1.0), "z_loss must be a number of at least 0"),
    (setting(num_valid_tokens=-1), "num_valid_tokens must be an int of at least 0"),
    (setting(num_valid_tokens=3, reduction="sum"), 'num_valid_tokens divides reduction="mean"'),
    (setting(e_grad_reduce_dtype=torch.float16), "e_grad_reduce_dtype is no longer an option"),
    (setting(bias=torch.zeros(3)), "bias must be"),
    (setting(token_weight=torch.zeros(3)), r"token_weight must be \[6\]"),
    (rows((0, 6), (5, 11)), r"overlap at row 5: \[0, 6\), \[5, 11\)"),
    (rows((0, 6), (7, 11)), "leave a gap at row 6"),
    (rows((0, 6), (6, 11), vocab_size=14), "end at 11, before the vocabulary of 14"),
    (on_rank(1, rows((0, 0), (6, 11), vocab_size=11)), "different vocabularies|leave a gap"),
    (on_rank(1, setting(label_smoothing=0.1)), r"must agree.*label_smoothing: \[0.0, 0.1\]"),
    (on_rank(1, setting(reduction="sum")), r"reduction: \['mean', 'sum'\]"),
    (on_rank(1, setting(accumulate_into="grad")), r"accumulate_into: \[None, 'grad'\]"),
    (on_rank(1, setting(num_valid_tokens=7)), r"num_valid_tokens: \[None, 7\]"),
    (divided_by_rank, r"num_valid_tokens: \[7, 8\]"),
    (setting(num_valid_tokens=torch.tensor(-5)), "must count tokens, at least 0, got -5"),
    (on_rank(1, without_reduction), r"reduce_e_grad: \[True, False\]"),
    (on_rank(1, setting(memory_budget=2**20)), r"memory_budget: \[None, 1048576\]"),
    (on_rank(1, setting(microbatches_in_flight=2)),
     r"impl_options: \[\[\], \[\('microbatches_in_flight', 2\)\]\]"),
    (on_rank(1, target(3)), "have different targets"),
    (on_rank(1, setting(e=torch.zeros(TOKENS, HIDDEN))), r"e requires grad: \[True, False\]"),
    (on_rank(1, options_with(start=6.0)), "rank 1 of the vocab group: start must be an integer"),
    (on_rank(0, options_with(vocab_size="11")), "rank 0 of the vocab group: vocab_size must be"),
    (on_rank(1, in_two_sequences), r"sequence length of e: \[6, 3\]"),
    (of_two_types, r"softcap: \[3.0, 3\]"),
    (on_meta, "e is on the meta device and has no values"),
]  # fmt: skip


def check_mistakes() -> None:
    rank = dist.get_rank()
    for change, pattern in MISTAKES:
        given = arguments()
        change(given, rank)
        if pattern.startswith("different") and rank == 0:  # only rank 1 says how large it is
            given["vocab_parallel_options"] = VocabParallelOptions(0, 6)
        with pytest.raises(ValueError, match=pattern if rank == 0 else None) as caught:
            linear_cross_entropy(**given)
        texts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(texts, str(caught.value))
        if "rank by rank" not in texts[0] and "c has 9 rows" not in texts[0]:
            assert len(set(texts)) == 1, texts

    # Token counts that differ between the ranks of a gathering layout.
    given = arguments()
    given["hidden_layout"] = "sharded"
    if rank == 1:
        given["e"], given["targets"] = (
            given["e"].detach()[:4].requires_grad_(),
            given["targets"][:4],
        )
    with pytest.raises(ValueError, match=r"tokens of e: \[6, 4\]"):
        linear_cross_entropy(**given)

    # How many tokens are predicted decides what is communicated.
    for k, pattern in ((3, r"k: \[1, 3\]"), ("3", "rank 1 of the vocab group: k must be an int")):
        given = arguments()
        del given["targets"]
        with pytest.raises(ValueError, match=pattern):
            predict(**given, k=k if rank else 1)

    # Inside of torch.func, on all ranks or on one.
    given = arguments()
    e = given.pop("e").detach()

    def loss_of(e: Tensor) -> Tensor:
        return linear_cross_entropy(e, **given)

    for transform in (torch.func.grad, torch.func.vmap):
        for which in ((0, 1), (1,)):
            function = transform(loss_of) if rank in which else loss_of
            with pytest.raises(ValueError, match=r"e is inside of a transform of torch\.func"):
                function(e[None] if function is not loss_of and transform is torch.func.vmap else e)

    # The collectives are still matched.
    loss = linear_cross_entropy(**arguments())
    assert isinstance(loss, Tensor)
    loss.backward()


def test_mistakes() -> None:
    run_ranks(check_mistakes, 2)


@pytest.mark.parametrize("function", [linear_cross_entropy, token_logprobs])
def test_every_setting_is_agreed_on(function: Callable[..., Any]) -> None:
    """A new argument is agreed on, unless it is a tensor or is named here as a rank's own."""
    own = {"vocab_parallel_options", "validate"}  # rows, and whether to agree at all
    tensors = {"e", "c", *(each.name for each in fields(Operands))}
    settings = {each.name for each in fields(LossSettings)}
    assert set(inspect.signature(function).parameters) <= own | tensors | settings
    operands = Operands.of(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.int32))
    bound = prepare(operands, LossSettings(), None, validate=None).bound
    assert settings - {"num_valid_tokens"} <= set(bound.equal), "whose value is told at each call"


def check_outsider() -> None:
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="this rank is not in the vocab group"):
            VocabParallelOptions.from_vocab(VOCABULARY, group)


def test_a_rank_outside_of_the_group() -> None:
    run_ranks(check_outsider, 2)


def test_misspelt_options() -> None:
    """The nearest of the loss's options and of the implementation's, or what others call it."""
    given = arguments()
    e, c, targets = given["e"], torch.zeros(VOCABULARY, HIDDEN), given["targets"]
    for name, words in (
        ("lable_smoothing", "did you mean 'label_smoothing'"),
        ("ignore_idx", "did you mean 'ignore_index'"),
        ("microbatch_in_flight", "did you mean 'microbatches_in_flight'"),
        ("lse_square_scale", "which is z_loss here"),
        ("linear_weight", "which is c here"),
        ("filter_eps", 'which is an option of impl="cce"'),
        ("weight", "which is c here.*token_weight"),
        ("colour", r"the loss has \[.*\], impl 'auto' has \['microbatches_in_flight'"),
    ):
        with pytest.raises(ValueError, match=rf"unknown option '{name}'.*{words}"):
            linear_cross_entropy(e, c, targets, **{name: 0.1})
        with pytest.raises(ValueError, match=rf"unknown option '{name}'.*{words}"):
            multi_token_cross_entropy([e], c, targets, shift=(0,), **{name: 0.1})
        with pytest.raises(ValueError, match=rf"unknown option '{name}'.*{words}"):
            CCEPipelineLoss(c, **{name: 0.1})
    # What a relative does not have is not what it may be meant.
    with pytest.raises(ValueError, match=r"unknown option 'label_smoothing': the loss has"):
        token_logprobs(e, c, targets, label_smoothing=0.1)
    with pytest.raises(ValueError, match="did you mean 'head_weights'"):
        multi_token_cross_entropy([e], c, targets, shift=(0,), head_weight=(1.0,))
    with pytest.raises(ValueError, match=r"input is e here.*weight is c here.*target is targets"):
        linear_cross_entropy(input=e, weight=c, target=targets)
    with pytest.raises(ValueError, match=r"missing .*'targets'; target is targets here"):
        token_logprobs(e, c, target=targets)
    with pytest.raises(TypeError, match=r"missing .*'targets'"):
        linear_cross_entropy(e, c)


def check_calls_found_again() -> None:
    """What is known of a shape is of this rank alone: a later mistake still ends on all of them."""
    group = dist.new_group(timeout=timedelta(seconds=40))
    for _ in range(2):
        for _ in range(3):  # the first makes, the others find
            given = arguments() | {
                "vocab_parallel_options": VocabParallelOptions.from_vocab(VOCABULARY, group)
            }
            linear_cross_entropy(**given).backward()
        assert len(bound_calls._bound) == 1, "a group made anew is the same shape"
        for change in (
            lambda given, rank: given.update(e=torch.randn(TOKENS + 1, HIDDEN)),
            lambda given, rank: given.update(e=given["e"].double()),
            setting(shift=1.0),
            setting(shift=True, z_loss=True),
            setting(softcap=3.0),
            target(VOCABULARY),
            setting(num_valid_tokens=-1),
        ):
            given = arguments()
            given["vocab_parallel_options"] = VocabParallelOptions.from_vocab(VOCABULARY, group)
            on_rank(1, change)(given, dist.get_rank())
            with pytest.raises(ValueError, match=r"rank 1|rank by rank"):
                linear_cross_entropy(**given)
        bound_calls._bound.clear()
        dist.barrier()
        dist.destroy_process_group(group)
        group = dist.new_group(timeout=timedelta(seconds=40))
    dist.barrier()


def test_calls_found_again() -> None:
    run_ranks(check_calls_found_again, 2)


def test_what_is_kept_of_a_shape() -> None:
    """Neither the parameter nor the group: a dictionary must keep nothing alive, and be small."""
    e, c = torch.randn(4, 3), torch.randn(7, 3)
    bound_calls.forget()
    linear_cross_entropy(e, c, torch.zeros(4, dtype=torch.int64))
    (kept,) = bound_calls._bound.values()
    assert kept.shard.classifier.shape == c.shape
    assert kept.shard.classifier.untyped_storage().nbytes() == c.element_size()
    for tokens in range(1, 300):
        linear_cross_entropy(e[:1].expand(tokens, 3), c, torch.zeros(tokens, dtype=torch.int64))
    assert len(bound_calls._bound) <= bound_calls._MOST
