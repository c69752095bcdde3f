"""launch.train --shard-body: equal to one process, and to whole copies of the body."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from launch.arguments import TrainArguments
from launch.data.load import load_batches
from launch.model import vocabulary_rows
from launch.optimizer import AdamW
from launch.sharded_body import refuse_to_shard, replicated_parameters
from launch.training import run
from launch.training_pipeline import build_pipeline, model_of
from stage_groups import build_stage_groups
from tests.ranks import run_ranks
from tests.recording import CollectiveRecorder
from vocab_parallel import clip_grad_norm_

CPU = torch.device("cpu")
VOCABULARY, STEPS = 160, 3


def arguments_of(folder: Path, out: str, **changes: Any) -> TrainArguments:
    sizes: dict[str, Any] = {
        "pipeline": 2, "vocab": 1, "data": 2, "microbatches": 2, "batch": 16, "sequence": 8,
        "steps": STEPS, "vocabulary": VOCABULARY, "hidden": 32, "text": folder / "ids.npy",
        "shard_body": True, "clip_norm": 0.5, "timeout": 25.0,
    }  # fmt: skip
    arguments = TrainArguments(out=folder / out, **(sizes | changes))
    arguments.validate()
    return arguments


def write_ids(folder: Path) -> None:
    draws = np.random.default_rng(0)
    np.save(folder / "ids.npy", draws.integers(0, VOCABULARY, 4096, dtype=np.int32))


def trained(arguments: TrainArguments) -> tuple[dict[str, Any], list[float]]:
    """Run launch.train, and return its run.json and the norms of its steps' gradients."""
    assert run(arguments, CPU)
    dist.barrier()
    document: dict[str, Any] = json.loads((arguments.out / "run.json").read_text())
    lines = map(json.loads, (arguments.out / "log.jsonl").read_text().splitlines())
    return document, [line["gradient_norm"] for line in lines if "gradient_norm" in line]


def exported(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def check_what_a_rank_holds(folder: Path) -> None:
    """A half of the body, its gradients and moments; gathered and reduced once a step."""
    groups = build_stage_groups(2, 1, data=2, device_type="cpu")
    arguments = arguments_of(folder, "none", accumulate=2)
    pipeline = build_pipeline(arguments, *model_of(arguments), groups, CPU)
    sizes = {name: own.numel() for name, own in pipeline.stages.named_parameters()}
    pipeline.shard_body(torch.float32)
    optimizer = AdamW.of(arguments, pipeline.parameters())
    batches = load_batches(
        arguments, steps=2, batch=16, sequence=8, vocabulary=VOCABULARY, model=None
    )
    whole_rows = vocabulary_rows(pipeline.stages)
    body = sum(
        own.numel() for own in pipeline.stages.parameters() if id(own) not in whole_rows
    )  # of DTensors, the whole
    for step in range(2):
        batch = pipeline.column_of(batches, step)
        with CollectiveRecorder() as seen:
            pipeline.accumulate(batch, arguments.accumulate)
        sent = {
            name: sum(call.size for call in seen.calls if call.name == name)
            for name in ("all_gather", "reduce_scatter")
        }
        if step == 1:  # the first one infers shapes besides
            assert sent == {"all_gather": 4 * body // 2, "reduce_scatter": 4 * body}
        clip_grad_norm_(pipeline.stages, 1.0, groups)
        optimizer.step()
        held_bytes: dict[int, int] = {}
        for name, parameter in pipeline.stages.named_parameters():
            share = 1 if id(parameter) in whole_rows else 2
            state = optimizer.state[parameter]
            for held in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]):
                assert held is not None
                assert isinstance(held, DTensor) == (share == 2), name
                local = held.to_local() if isinstance(held, DTensor) else held
                assert share * local.numel() == sizes[name], name
                if share == 2:
                    storage = local.untyped_storage()
                    held_bytes[storage.data_ptr()] = storage.nbytes()
        assert sum(held_bytes.values()) == 4 * 4 * body // 2, "and no views of something larger"
        optimizer.zero_grad()


def check_what_stays_whole(folder: Path) -> None:
    """A parameter of another dtype, as some families have; it is summed like rows."""
    groups = build_stage_groups(2, 1, data=2, device_type="cpu")
    arguments = arguments_of(folder, "none")
    pipeline = build_pipeline(arguments, *model_of(arguments), groups, CPU)
    named = dict(pipeline.stages.named_parameters())
    norms = {name for name in named if name.endswith("q_norm.weight")}
    for name in norms:
        named[name].data = named[name].data.double()
    pipeline.shard_body(torch.float32)
    rows = vocabulary_rows(pipeline.stages)
    left = {
        name
        for name, own in pipeline.stages.named_parameters()
        if not isinstance(own, DTensor) and id(own) not in rows
    }
    assert norms
    assert left == norms
    assert len(replicated_parameters(pipeline.parameters())) == len(norms) + len(rows)


def check_train(folder: str) -> None:
    """One process's gradients and losses; a resume on this mesh and on another one."""
    here = Path(folder)
    if dist.get_rank() == 0:
        write_ids(here)
    dist.barrier()
    check_what_a_rank_holds(here)
    check_what_stays_whole(here)

    scores: dict[str, Any] = {
        "eval_text": here / "ids.npy", "eval_every": 2, "eval_batches": 1, "check": True,
    }  # fmt: skip
    saved: dict[str, Any] = {"checkpoint": here / "saved", "checkpoint_every": 2}
    common: dict[str, Any] = {"accumulate": 2, "recompute": "first"}
    found, _ = trained(arguments_of(here, "whole", export=here / "a", **saved, **scores, **common))
    restart_from(here / "saved", 2)
    again, _ = trained(arguments_of(here, "again", resume=True, **saved, **common))
    assert again["first_step"] == 2
    assert again["losses"] == found["losses"], "bitwise"
    restart_from(here / "saved", 2)
    mesh = {"pipeline": 1, "vocab": 2}
    other, _ = trained(arguments_of(here, "other", resume=True, export=here / "b", **saved, **mesh))
    assert other["losses"] == pytest.approx(found["losses"], rel=1e-6)
    assert_same_models(here / "a", here / "b")


def restart_from(folder: Path, step: int) -> None:
    """Drop the checkpoints after a step."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in folder.iterdir():
            if path.name > f"step-{step:06d}":
                shutil.rmtree(path)
    dist.barrier()


def assert_same_models(one: Path, two: Path) -> None:
    expected = exported(two)
    found = exported(one)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_equals_one_process(tmp_path: Path) -> None:
    run_ranks(check_train, 4, timeout=110, folder=str(tmp_path))


def write_models(folder: Path) -> None:
    """A tied model whose heads have fewer dimensions than there are copies, and one of experts."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    tied = Qwen3Config(**sizes, head_dim=2, tie_word_embeddings=True)
    Qwen3ForCausalLM(tied).save_pretrained(folder / "tied")
    experts = Qwen3MoeConfig(
        **sizes, head_dim=8, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=16
    )
    Qwen3MoeForCausalLM(experts).save_pretrained(folder / "experts")


def check_meshes(folder: str, cases: list[dict[str, Any]]) -> None:
    """One process's gradients, and what whole copies of the body train: losses, norms, weights."""
    here = Path(folder)
    if dist.get_rank() == 0:
        write_ids(here)
        write_models(here)
    dist.barrier()
    for number, case in enumerate(cases):
        case = {"vocabulary": VOCABULARY} | case
        if "model" in case:
            case = {**case, "model": str(here / case["model"])}
            case["vocabulary"], case["hidden"] = TrainArguments.vocabulary, TrainArguments.hidden
        case["check"] = case.get("dtype") != "bfloat16"
        # Copies are added up after the columns, shards before: in bfloat16 that is another sum,
        # of which Adam makes other steps where a gradient is nearly 0.
        rounds = case.get("vocab", 1) > 1 and not case["check"]
        near = {"rel": 1e-3 if rounds else 1e-6}
        results = []
        for name, shards in (("sharded", True), ("copies", False)):
            saved = here / f"{number}-{name}-saved"
            case |= {"shard_body": shards, "checkpoint": saved, "checkpoint_every": 2}
            export = here / f"{number}-{name}"
            results.append(
                trained(arguments_of(here, f"{number}-{name}-out", export=export, **case))
            )
        (found, norms), (copies, expected) = results
        assert found["losses"] == pytest.approx(copies["losses"], **near), case
        compared = 1 if rounds else STEPS
        assert norms[:compared] == pytest.approx(
            expected[:compared], rel=1e-5 if not rounds else 1e-3
        )
        held = [[rank["parameters"] for rank in run["ranks"]] for run in (found, copies)]
        assert all(one < two for one, two in zip(*held, strict=True))
        if not rounds:
            assert_same_models(here / f"{number}-sharded", here / f"{number}-copies")
        # What one has saved, the other goes on from.
        for name, shards, whole in (("sharded", False, copies), ("copies", True, found)):
            saved = here / f"{number}-{name}-saved"
            restart_from(saved, 2)
            case |= {"shard_body": shards, "checkpoint": saved, "check": False}
            again, _ = trained(arguments_of(here, f"{number}-{name}-out", resume=True, **case))
            assert again["losses"] == pytest.approx(whole["losses"], **near), case


FOUR: list[dict[str, Any]] = [
    {"schedule": "Interleaved1F1B", "accumulate": 2, "model": "tied", "recompute": "all"},
    {"schedule": "LoopedBFS", "model": "experts"},
    {"schedule": "GPipe", "dtype": "bfloat16"},
    {"pipeline": 1, "vocab": 2, "dtype": "bfloat16", "float32_weights": False, "model": "tied"},
]
SPLIT: list[dict[str, Any]] = [
    {"schedule": "ZBVZeroBubble", "accumulate": 2, "model": "tied"},
    {"schedule": "InterleavedZeroBubble", "vocab_over": "all-stages"},
    {"schedule": "DualPipeV", "microbatches": 4, "model": "experts"},
]
SPANNING: list[dict[str, Any]] = [
    {"vocab_over": "all-stages", "accumulate": 2, "recompute": "all"},
    {"vocab_over": "all-stages", "schedule": "Interleaved1F1B", "model": "tied"},
]
THREE: list[dict[str, Any]] = [{"pipeline": 1, "data": 3, "batch": 12, "model": "tied"}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "cases"), [(4, FOUR[:2]), (4, FOUR[2:]), (4, SPLIT), (4, SPANNING), (3, THREE)]
)
def test_meshes(ranks: int, cases: list[dict[str, Any]], tmp_path: Path) -> None:
    run_ranks(check_meshes, ranks, timeout=170, folder=str(tmp_path), cases=cases)


def test_what_cannot_be_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="give --data 2 or more"):
        arguments_of(tmp_path, "none", data=1)
    monkeypatch.setattr("launch.sharded_body.loses_nodes", lambda: True)
    refuse_to_shard(arguments_of(tmp_path, "none"))
    refuse_to_shard(arguments_of(tmp_path, "none", schedule="DualPipeV", shard_body=False))
    with pytest.raises(ValueError, match=r"ZBVZeroBubble.*needs torch 2\.13 or newer.*use 1F1B"):
        refuse_to_shard(arguments_of(tmp_path, "none", schedule="ZBVZeroBubble"))
