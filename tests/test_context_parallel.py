"""Parts of every sequence on context-parallel ranks, against whole sequences in one process.

What docs/long-contexts.md prints runs as it is printed.
"""

import runpy
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.oracle import oracle, relative_error
from tests.ranks import ROOT, run_ranks
from tests.test_examples import python_blocks
from vocab_parallel import CCEPipelineLoss, VocabParallelClassifier, count_valid_tokens

PAGE = (ROOT / "docs" / "long-contexts.md").read_text()
LENGTH = 24


def run_snippet(word: str, **given: Any) -> dict[str, Any]:
    """Run the page's one snippet that has the word, and return its names."""
    (snippet,) = (block for block in python_blocks(PAGE) if word in block)
    names: dict[str, Any] = {"__name__": "snippet", **given}
    exec(compile(snippet, "docs/long-contexts.md", "exec"), names)
    return names


def own_places(rank: int, size: int, balanced: bool) -> Tensor:
    """Return where a rank's tokens stand in their sequences: one run, or two pieces."""
    if not balanced:
        return torch.arange(LENGTH).chunk(size)[rank]
    pieces = torch.arange(LENGTH).chunk(2 * size)
    return torch.cat((pieces[rank], pieces[-1 - rank]))


class Case:
    """Sequences, their model, and what one process makes of them in float64."""

    def __init__(self, hidden_places: Tensor | None) -> None:
        torch.manual_seed(0)
        example = runpy.run_path(str(ROOT / "examples" / "context_parallel.py"))
        self.model: nn.Module = example["Model"]().double()
        self.tokens = torch.randint(1000, (2, LENGTH))
        self.tokens[1, 20:] = -100  # a short sequence
        if hidden_places is not None:  # no label of a whole part counts
            self.tokens[:, (hidden_places + 1).clamp(max=LENGTH - 1)] = -100
        self.ids = self.tokens.clamp(min=0)
        hidden = self.model(self.ids, torch.arange(LENGTH))
        self.loss, _ = oracle(hidden, self.model.lm_head.weight, self.tokens, shift=1)
        self.loss.backward()
        named = self.model.named_parameters()
        self.grads = {name: parameter.grad for name, parameter in named}
        self.model.zero_grad()

    def check(self, loss: Tensor, head: VocabParallelClassifier) -> None:
        """Compare a loss of all parts and gradients that were summed over them."""
        assert relative_error(loss, self.loss) < 1e-12
        rows = self.grads["lm_head.weight"][head.start : head.stop]
        assert relative_error(head.weight.grad, rows, 1e-9) < 1e-11
        for name in ("embedding.weight", "attention.weight", "attention.bias"):
            found = self.model.get_parameter(name).grad
            assert relative_error(found, self.grads[name]) < 1e-11, name


def check_beside_a_vocab_group() -> None:
    """2 cp x 2 vocab ranks: one run or two pieces, one part without labels, labels split before."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "vocab"))
    cp, cp_group, vocab_group = mesh["cp"], mesh.get_group("cp"), mesh.get_group("vocab")
    rank = cp.get_local_rank()
    for balanced in (False, True):
        own = own_places(rank, 2, balanced)
        for masked in (None, own_places(1, 2, balanced)):
            case = Case(masked)
            head = VocabParallelClassifier.from_linear(case.model.lm_head, vocab_group)
            case.model.lm_head = head
            hidden = case.model(case.ids[:, own], own, cp)
            names = run_snippet(
                "count_valid_tokens", tokens=case.tokens, own=own, cp_group=cp_group,
                hidden=hidden, head=head,
            )  # fmt: skip
            value = names["value"].detach()
            if masked is not None and rank == 1:
                assert value == 0.0
                assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))
            for summed in (value, *(each.grad for each in case.model.parameters())):
                dist.all_reduce(summed, group=cp_group)
            case.check(value, head)
            split = run_snippet(
                "all_gather", labels=case.tokens[:, own], own=own, cp_group=cp_group, cp_size=2
            )
            assert torch.equal(split["labels"], names["labels"])


def check_averaging() -> None:
    """FSDP2's body over cp, told not to average, and DDP, which cannot be told."""
    # torch 2.14 warns of writes into a view: attention's output is one, and nobody writes to it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "vocab"))
    cp, cp_group = mesh["cp"], mesh.get_group("cp")
    own = own_places(cp.get_local_rank(), 2, True)
    case = Case(None)
    head = VocabParallelClassifier.from_linear(case.model.lm_head, mesh.get_group("vocab"))
    case.model.lm_head = nn.Identity()
    body = fully_shard(case.model, mesh=cp)
    run_snippet("set_gradient_divide_factor", body=body)
    names = run_snippet(
        "count_valid_tokens", tokens=case.tokens, own=own, cp_group=cp_group, head=head,
        hidden=body(case.ids[:, own], own, cp),
    )  # fmt: skip
    value = names["value"].detach()
    for summed in (value, head.weight.grad):
        dist.all_reduce(summed, group=cp_group)
    for parameter in body.parameters():
        parameter.grad = parameter.grad.full_tensor()
    case.check(value, head)

    case = Case(None)
    head = VocabParallelClassifier.from_linear(case.model.lm_head, mesh.get_group("vocab"))
    case.model.lm_head = head
    model = DistributedDataParallel(case.model, process_group=cp_group)
    loss, labels = CCEPipelineLoss(head, shift=0), names["labels"]
    loss.num_valid_tokens = count_valid_tokens(labels, [cp_group])
    value = loss(model(case.ids[:, own], own, cp), labels)
    (value * cp.size()).backward()
    dist.all_reduce(value.detach(), group=cp_group)
    case.check(value, head)


def check_within_the_vocab_group() -> None:
    """Four cp ranks that are the vocab group: labels shifted before the split, or whole."""
    cp = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    rank = cp.get_local_rank()
    for balanced, layout in ((False, "sequence"), (True, "sharded"), (False, "sharded")):
        own = own_places(rank, 4, balanced)
        for masked in (None, own_places(1, 4, balanced)):
            case = Case(masked)
            head = VocabParallelClassifier.from_linear(case.model.lm_head, cp.get_group())
            case.model.lm_head = head
            shift = int(layout == "sequence")
            loss = CCEPipelineLoss(head, shift=shift, hidden_layout=layout)
            shifted = nn.functional.pad(case.tokens[:, 1:], (0, 1), value=-100)
            labels = case.tokens if shift else shifted[:, own]
            value = loss(case.model(case.ids[:, own], own, cp), labels)
            value.backward()
            for name, parameter in case.model.named_parameters():
                if name != "lm_head.weight":
                    dist.all_reduce(parameter.grad)
            case.check(value, head)


def check_over_ranks() -> None:
    check_beside_a_vocab_group()
    check_averaging()
    check_within_the_vocab_group()


def test_over_ranks() -> None:
    run_ranks(check_over_ranks, 4)


def test_every_snippet_is_run() -> None:
    words = ("count_valid_tokens", "set_gradient_divide_factor", "all_gather")
    blocks = python_blocks(PAGE)
    assert len(blocks) == len(words)
    assert all(sum(word in block for word in words) == 1 for block in blocks)
