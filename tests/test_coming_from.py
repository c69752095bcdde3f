"""What docs/coming-from.md prints under "after" is what it prints under "before", in float64."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import oracle, relative_error
from tests.ranks import ROOT, run_ranks
from tests.test_examples import python_blocks
from vocab_parallel import available_impls, linear_cross_entropy
from vocab_parallel.backends.registry import option_names

PAGE = (ROOT / "docs" / "coming-from.md").read_text().partition("\n## Their tests")[0]
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
VOCABULARY, HIDDEN = 37, 6
OPTIONS: dict[str, dict[str, Any]] = {
    "F.cross_entropy": {"shift": 1},
    "F.linear_cross_entropy": {"label_smoothing": 0.1},
    "cut-cross-entropy": {"shift": 1},
    "Liger": {"z_loss": 1e-4, "softcap": 30.0},
}


def run_snippet(section: str, index: int, **given: Any) -> dict[str, Any]:
    """Run what stands before (0) or after (1) in a section, and return its names."""
    names: dict[str, Any] = {"__name__": "snippet", **given}
    exec(compile(python_blocks(SECTIONS[section])[index], "docs/coming-from.md", "exec"), names)
    return names


def tensors() -> dict[str, Tensor]:
    given = {
        "e": torch.randn(2, 9, HIDDEN, dtype=torch.float64),
        "c": torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64),
        "bias": torch.randn(VOCABULARY, dtype=torch.float64),
    }
    targets = torch.randint(VOCABULARY, (2, 9))
    targets[1, 5:] = -100
    return {**{name: each.requires_grad_() for name, each in given.items()}, "targets": targets}


def test_every_section_has_both() -> None:
    assert SECTIONS.keys() == OPTIONS.keys() | {"Megatron"}
    for section in SECTIONS.values():
        before, after = re.split(r"\nAfter[^\n]*:\n", section)
        assert len(python_blocks(before)) == len(python_blocks(after)) == 1
        assert re.search(r"\nBefore[^\n]*:\n", before)


@pytest.mark.parametrize("section", OPTIONS)
def test_after(section: str) -> None:
    given = tensors()
    leaves = [given[name] for name in ("e", "c", "bias")]
    expected, _ = oracle(**given, **OPTIONS[section])
    exact = torch.autograd.grad(expected, leaves)
    found = run_snippet(section, 1, **given)["loss"]
    assert relative_error(found, expected) < 1e-12
    for ours, want in zip(torch.autograd.grad(found, leaves), exact, strict=True):
        assert relative_error(ours, want) < 1e-11
    runs_here = section == "F.cross_entropy" or (
        section == "F.linear_cross_entropy" and hasattr(F, "linear_cross_entropy")
    )
    if runs_here:
        before = run_snippet(section, 0, **given)["loss"]
        assert relative_error(before, expected) < 1e-6  # of float32 logits


def test_others_arguments() -> None:
    """A ninth positional argument, an older release's fourth, swapped operands, their names."""
    given = tensors()
    e, c, targets = given["e"], given["c"], given["targets"]
    with pytest.raises(ValueError, match=r"return_lse must be True or False, got 'auto'.*filter"):
        linear_cross_entropy(e, c, targets, None, -100, None, "mean", 1, "auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown reduction True"):
        linear_cross_entropy(e, c, targets, -100, None, "mean", True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected hidden states e"):
        linear_cross_entropy(c, e, targets)
    with pytest.raises(ValueError, match="unknown option 'linear_bias', which is bias here"):
        linear_cross_entropy(e, c, targets, linear_bias=given["bias"])
    with pytest.raises(ValueError, match=r"input is e here.*linear_weight is c here"):
        linear_cross_entropy(input=e, linear_weight=c, targets=targets)  # type: ignore[call-arg]


def test_names_of_kernels() -> None:
    """The enum's names, in lower case, are ours, and know its option."""
    module = pytest.importorskip("cut_cross_entropy")
    for each in module.LinearCrossEntropyImpl:
        assert each.name.lower() in available_impls()
    assert "filter_eps" in option_names("cce")
    given = tensors()
    e, c, targets = given["e"], given["c"], given["targets"]
    member: Any = module.LinearCrossEntropyImpl.CCE
    with pytest.raises(ValueError, match=r"unknown impl .*LinearCrossEntropyImpl\.CCE.*'cce'"):
        linear_cross_entropy(e, c, targets, impl=member)


def check_megatron() -> None:
    """Rows that are padded for the group, the last of which are no tokens."""
    torch.manual_seed(0)
    given, rank, padded = tensors(), dist.get_rank(), 48
    whole = torch.randn(padded, HIDDEN, dtype=torch.float64, requires_grad=True)
    hidden = given["e"].detach().transpose(0, 1).contiguous().requires_grad_()
    labels, loss_mask = given["targets"].clamp(min=0), (given["targets"] != -100).double()
    for vocab_size in (VOCABULARY, padded):
        logits = hidden.transpose(0, 1) @ whole[:vocab_size].T
        losses = F.cross_entropy(logits.mT, labels, reduction="none")
        expected = (losses * loss_mask).sum() / loss_mask.sum()
        exact = torch.autograd.grad(expected, [hidden, whole])
        model = nn.Module()
        model.output_layer = nn.Linear(HIDDEN, padded // 2, bias=False, dtype=torch.float64)
        own = slice(rank * padded // 2, (rank + 1) * padded // 2)
        model.output_layer.weight = nn.Parameter(whole.detach()[own])
        found = run_snippet(
            "Megatron", 1, model=model, hidden=hidden, labels=labels, loss_mask=loss_mask,
            tp_group=None, vocab_size=vocab_size, padded_vocab_size=padded,
        )["loss"]  # fmt: skip
        assert relative_error(found, expected) < 1e-12
        ours = torch.autograd.grad(found, [hidden, model.output_layer.weight])
        assert relative_error(ours[0], exact[0]) < 1e-11
        assert relative_error(ours[1], exact[1][own]) < 1e-11


def test_megatron() -> None:
    run_ranks(check_megatron, 2)
