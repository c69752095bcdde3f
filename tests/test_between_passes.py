"""What happens to an input between forward and backward: the right gradients, or torch's error.

Every tensor of a call is overwritten, one at a time, as an optimizer or a data loader that reuses
its buffers would do. Whatever backward reads of it is a saved tensor, which torch refuses once it
was changed, or a copy.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.oracle import oracle, relative_error
from tests.ranks import run_ranks
from vocab_parallel import (
    CCEPipelineLoss,
    VocabParallelEmbedding,
    VocabParallelOptions,
    linear_cross_entropy,
    linear_distillation,
    linear_distillation_from_top_k,
    multi_token_cross_entropy,
    token_logprobs,
)

ROWS, HIDDEN, LENGTH, BATCH, TOP = 11, 5, 6, 2, 3
SHIFTS = (1, 2)
Draw = random.Random
Tensors = dict[str, Tensor]
# A relative: its tensors by name and a function of them whose results have a gradient.
Relative = tuple[Tensors, Callable[[Tensors], Any]]


def drawn_tensors(draw: Draw, layout: str) -> Tensors:
    """Return the operands of a call on this rank; labels are equal on all ranks, which is right."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    degree = dist.get_world_size()
    own = LENGTH // degree if layout == "sequence" else LENGTH
    options = VocabParallelOptions.from_vocab(ROWS)
    rows = slice(options.start, options.stop)
    dtype = draw.choice((torch.float32, torch.float64))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    targets = torch.randint(ROWS, (BATCH, LENGTH), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    found = {
        "e": normal(BATCH, own, HIDDEN),
        "c": normal(ROWS, HIDDEN)[rows].clone(),
        "targets": targets.to(draw.choice((torch.int32, torch.int64))),
    }
    if draw.random() < 0.6:
        found["bias"] = normal(ROWS)[rows].clone()
    if draw.random() < 0.7:
        found["token_weight"] = torch.rand(BATCH, LENGTH, generator=generator).to(
            draw.choice((dtype, torch.float32))
        )
    return found


def drawn_options(draw: Draw, layout: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "vocab_parallel_options": VocabParallelOptions.from_vocab(ROWS),
        "hidden_layout": layout,
        "softcap": draw.choice((None, 4.0)),
        "shift": draw.choice((0, 0, 1)),
    }
    if draw.random() < 0.3:
        options["hidden_grad_scale"] = 2.0
    return options


def of_the_loss(draw: Draw, layout: str) -> Relative:
    tensors, options = drawn_tensors(draw, layout), drawn_options(draw, layout)
    options |= {
        "reduction": draw.choice(("mean", "mean", "sum", "none")),
        "label_smoothing": draw.choice((0.0, 0.1)),
        "z_loss": draw.choice((0.0, 0.01)),
        "return_lse": draw.random() < 0.3,
        "impl": draw.choice(("chunked", "chunked", "reference")),
    }
    if options["impl"] == "chunked":
        way = draw.choice(("recompute", "probs"))
        options |= {"backward": way, "memory_budget": 200}  # tiles of a few tokens and rows
    if options["reduction"] == "mean" and draw.random() < 0.4:
        tensors["num_valid_tokens"] = torch.tensor(7)
    if draw.random() < 0.4:
        tensors["document_ids"] = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) // 4
    function = linear_cross_entropy
    if draw.random() < 0.3:
        function = multi_token_cross_entropy  # type: ignore[assignment]
        options |= {"shift": SHIFTS, "return_lse": False, "head_weights": (1.0, 0.5)}
        tensors["e"] = torch.stack([tensors["e"], tensors["e"].flip(-1)])
        if "num_valid_tokens" in tensors:
            tensors["num_valid_tokens"] = torch.tensor([7, 5])
    return tensors, lambda given: function(**given, **options)


def of_logprobs(draw: Draw, layout: str) -> Relative:
    tensors, options = drawn_tensors(draw, layout), drawn_options(draw, layout)
    tensors.pop("token_weight", None)
    options |= {"return_entropy": draw.random() < 0.7, "backward": draw.choice(("auto", "probs"))}
    return tensors, lambda given: token_logprobs(**given, **options)


def of_distillation(draw: Draw, layout: str) -> Relative:
    tensors, options = drawn_tensors(draw, layout), drawn_options(draw, layout)
    options |= {
        "divergence": draw.choice(("forward_kl", "reverse_kl", "js")),
        "cross_entropy_weight": draw.choice((0.0, 0.4)),
        "temperature": draw.choice((1.0, 2.0)),
        "reduction": draw.choice(("mean", "none")),
    }
    if options["reduction"] == "mean" and draw.random() < 0.5:
        tensors["num_valid_tokens"] = torch.tensor(7)
    e, c = tensors["e"], tensors["c"]
    if draw.random() < 0.5:
        tensors |= {"teacher_e": e.flip(-1), "teacher_c": c.flip(-1).clone()}
        return tensors, lambda given: linear_distillation(**given, **options)
    ids = torch.arange(e[..., 0].numel() * TOP).view(*e.shape[:-1], TOP) % ROWS
    tensors |= {"teacher_ids": ids, "teacher_logprobs": (e[..., :TOP] - 1.0).log_softmax(-1) - 0.5}
    return tensors, lambda given: linear_distillation_from_top_k(**given, **options)


def of_a_pipeline(draw: Draw, layout: str) -> Relative:
    tensors, options = drawn_tensors(draw, layout), drawn_options(draw, layout)
    bias, weight = tensors.pop("bias", None), tensors.pop("token_weight", None)
    tensors = {name: t for name, t in (("bias", bias), *tensors.items()) if t is not None}
    if weight is not None:
        tensors["token_weight"] = weight
    tensors["num_valid_tokens"] = torch.tensor(7)

    def call(given: Tensors) -> Tensor:
        more = {"token_weight": given["token_weight"]} if "token_weight" in given else {}
        loss = CCEPipelineLoss(given["c"], given.get("bias"), **options, **more)
        loss.num_valid_tokens = given["num_valid_tokens"]
        return loss(given["e"], given["targets"])

    return tensors, call


def of_an_embedding(draw: Draw, layout: str) -> Relative:
    layout = draw.choice(("replicated", "sharded"))
    module = VocabParallelEmbedding(HIDDEN, ROWS, group=dist.group.WORLD, layout=layout)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    ids = torch.randint(ROWS, (BATCH, LENGTH), generator=generator)
    weight = torch.randn(module.weight.shape, generator=generator)

    def call(given: Tensors) -> Tensor:
        found: Tensor = torch.func.functional_call(module, {"weight": given["c"]}, given["ids"])
        return found

    return {"c": weight, "ids": ids}, call


RELATIVES = (of_the_loss, of_the_loss, of_logprobs, of_distillation, of_a_pipeline, of_an_embedding)


def gradients(relative: Relative, overwritten: str | None) -> list[Tensor]:
    """Return the gradients of e, c and bias, an input overwritten before backward."""
    tensors, call = relative
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    leaves = [given[name].requires_grad_() for name in ("e", "c", "bias") if name in given]
    found = call(given)
    results = found if isinstance(found, tuple) else (found,)
    if overwritten is not None:
        with torch.no_grad():
            given[overwritten].zero_()
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.rand(r.shape, generator=generator, dtype=r.dtype) + 0.5 for r in results]
    return list(torch.autograd.grad(results, leaves, upstream))


def check_overwritten_inputs(examples: int) -> None:
    draw = Draw(f"{dist.get_world_size()} ranks")  # every rank draws the same
    for number in range(examples):
        layout = draw.choice(("replicated", "sharded", "sequence"))
        make = RELATIVES[number % len(RELATIVES)]
        relative = make(draw, layout)
        expected = gradients(relative, None)
        for name in relative[0]:
            found: list[Tensor] | str = "nothing"
            try:
                found = gradients(relative, name)
            except RuntimeError as error:
                found = str(error)
            where = (make.__name__, name, number)
            if isinstance(found, str):
                assert "modified by an inplace operation" in found, (where, found)
                continue
            for ours, want in zip(found, expected, strict=True):
                assert torch.equal(ours, want), where


@pytest.mark.parametrize("degree", [1, 2])
def test_overwritten_inputs(degree: int) -> None:
    run_ranks(check_overwritten_inputs, degree, examples=90 // degree)


@pytest.mark.parametrize("backward", ["recompute", "probs"])
def test_weights_of_a_reused_buffer(backward: str) -> None:
    torch.manual_seed(0)
    e, c = (torch.randn(n, 4, requires_grad=True) for n in (6, 9))
    targets, weight = torch.arange(6), torch.rand(6)
    exact, _ = oracle(e, c, targets, token_weight=weight)
    expected = torch.autograd.grad(exact, (e, c))
    loss = linear_cross_entropy(e, c, targets, token_weight=weight, backward=backward)
    weight.zero_()
    for ours, want in zip(torch.autograd.grad(loss, (e, c)), expected, strict=True):
        assert relative_error(ours, want) < 1e-6
