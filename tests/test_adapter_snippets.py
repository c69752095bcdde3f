"""What docs/adapters.md prints runs as it is printed, given what it says is the reader's."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from transformers import AutoModelForCausalLM, TrainingArguments

from stage_groups import build_stage_groups
from tests.oracle import relative_error
from tests.ranks import ROOT, run_ranks
from tests.test_adapters import TinyCausalLM, split_by_deletion, tiny
from tests.test_examples import python_blocks
from tests.test_transformers import Ids
from vocab_parallel import VocabParallelClassifier, no_loss, validate_pipeline_loss

PAGE = (ROOT / "docs" / "adapters.md").read_text()
RUN = (
    "Schedule1F1B",
    "shard_output_embeddings",
    "args=arguments, train_dataset=dataset)",
    "mesh=mesh",
)


def run_snippet(word: str, **given: Any) -> dict[str, Any]:
    """Run the page's one snippet that has the word, and return its names."""
    (snippet,) = (block for block in python_blocks(PAGE) if word in block)
    names: dict[str, Any] = {"__name__": "snippet", **given}
    exec(compile(snippet, "docs/adapters.md", "exec"), names)
    return names


def test_every_snippet_is_run() -> None:
    """By the tests below."""
    blocks = python_blocks(PAGE)
    assert len(blocks) == len(RUN)
    for block in blocks:
        assert sum(word in block for word in RUN) == 1


def check_pipelining() -> None:
    groups, device = build_stage_groups(2, 1, device_type="cpu"), torch.device("cpu")
    torch.manual_seed(0)
    first, model = nn.Embedding(97, 16), nn.Module()
    model.lm_head = nn.Linear(16, 97)
    last_stage_module = nn.Sequential(nn.Tanh())
    last_stage_module.lm_head = nn.Identity()
    labels = torch.randint(97, (8, 6))
    logits = model.lm_head(first(labels).tanh())
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    own = groups.pipeline_rank
    group = groups.pipeline_group
    stage = PipelineStage([first, last_stage_module][own], own, 2, device, group=group)
    if own == 0:
        schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=no_loss, scale_grads=False)
        validate_pipeline_loss(schedule, no_loss)
        schedule.step(labels)
        assert first.weight.grad is not None
    else:
        names = run_snippet(
            "Schedule1F1B", model=model, groups=groups, stage=stage, labels=labels,
            last_stage_module=last_stage_module,
        )  # fmt: skip
        assert relative_error(torch.stack(names["losses"]).sum(), expected) < 1e-6


def check_splitter() -> None:
    groups = build_stage_groups(2, 1, device_type="cpu")
    names = run_snippet(
        "shard_output_embeddings",
        groups=groups,
        create_manual_causal_lm_splitter=lambda: split_by_deletion,
    )
    device, indices = torch.device("cpu"), [(0,), (1,)]
    modules = names["splitter"](TinyCausalLM(), (), {}, indices, True, device, 0, None)[1]
    is_last = groups.pipeline_rank == 1
    assert isinstance(modules[0].output_decoder, VocabParallelClassifier) == is_last


def arguments_of(folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder, max_steps=1, use_cpu=True, report_to=[], save_steps=1, disable_tqdm=True,
    )  # fmt: skip


def check_rows(folder: str) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    before = model.lm_head.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Trainer's and accelerate's own
        run_snippet(
            "mesh=mesh", model=model, arguments=arguments_of(folder), dataset=Ids(),
            device_type="cpu",
        )  # fmt: skip
    dist.barrier()
    for saved in (folder, f"{folder}/checkpoint-1"):
        again: Any = AutoModelForCausalLM.from_pretrained(saved)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, before)


def check_over_ranks(folder: str) -> None:
    check_pipelining()
    check_splitter()
    check_rows(folder)


def test_over_ranks(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs it")
    run_ranks(check_over_ranks, 2, folder=str(tmp_path))


@pytest.mark.filterwarnings("ignore")  # of Trainer's and accelerate's own
def test_trainer(tmp_path: Path) -> None:
    """The model trains, without a logit; tests/test_transformers.py has the rest."""
    pytest.importorskip("accelerate", reason="Trainer needs it")
    model = tiny("llama", tie_word_embeddings=False)
    before = model.lm_head.weight.clone()
    run_snippet(RUN[2], model=model, arguments=arguments_of(str(tmp_path)), dataset=Ids())
    assert model(**{name: ids[None] for name, ids in Ids()[0].items()}).logits is None
    assert not torch.equal(model.lm_head.weight, before)
