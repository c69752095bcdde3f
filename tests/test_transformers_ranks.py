"""A model of transformers changed in place, on several ranks, beside itself unchanged under DDP."""

import copy
import gc
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as whole_state
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.test_adapters import tiny
from tests.test_transformers import compare, compare_rounded, trained
from vocab_parallel import (
    VocabParallelClassifier,
    WholeRowsCallback,
    remove_vocab_parallel_loss,
    use_vocab_parallel_loss,
)

STEPS = 3


def model_of(tied: bool = False) -> Any:
    return tiny("llama", tie_word_embeddings=tied)


def own_batches(seed: int = 0) -> list[dict[str, Any]]:
    """This rank's: sequences of other lengths, and other counts of labels, than its peers'."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(100 * seed + rank)
    batches = []
    for step in range(STEPS):
        ids = torch.randint(97, (2, 8 + (rank + step) % 3), generator=generator)
        labels = ids.clone()
        labels[0, : 2 + 3 * rank] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(call: nn.Module, model: nn.Module, batches: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Train; return losses and gradient norms, and every parameter at the end, whole."""
    # Its eps is large, lest Adam's division magnifies rounding to whole steps.
    optimizer = torch.optim.AdamW(call.parameters(), 1e-2, eps=1e-3)
    kept = []
    for batch in batches:
        loss = call(**batch).loss
        loss.backward()
        gradients = [whole(own.grad) for own in model.parameters() if own.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        kept += [loss.detach(), norm]
        optimizer.step()
        optimizer.zero_grad()
    return kept, {name: whole(own.detach()).clone() for name, own in model.named_parameters()}


def check_equal(found: Any, stock: Any) -> None:
    for ours, want in zip(found[0], stock[0], strict=True):
        assert relative_error(ours, want) < 1e-6
    assert found[1].keys() == stock[1].keys()
    for name, ours in found[1].items():
        assert relative_error(ours, stock[1][name]) < 1e-5, name


def units(model: Any, reshard: bool, head: bool, **more: Any) -> None:
    for part in (*model.model.layers, *([model.lm_head] if head else [])):
        fully_shard(part, reshard_after_forward=reshard, **more)
    fully_shard(model, reshard_after_forward=reshard, **more)


def check_whole_classifiers(mesh: DeviceMesh) -> None:
    """DDP, and FSDP2 in units of layers, the classifier apart or with the root."""
    stock_model = model_of()
    batches = own_batches()
    stock = run(DistributedDataParallel(stock_model), stock_model, batches)
    model = model_of()
    use_vocab_parallel_loss(model)
    check_equal(run(DistributedDataParallel(model), model, batches), stock)
    model = model_of()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    use_vocab_parallel_loss(wrapped)
    check_equal(run(wrapped, model, batches), stock)
    for head in (True, False):
        for reshard in (True, False):
            model = model_of()
            units(model, reshard, head, mesh=mesh)
            use_vocab_parallel_loss(model)
            check_equal(run(model, model, batches), stock)
    with torch.no_grad():
        logits = model(**batches[0]).logits
        expected = stock_model(**batches[0]).logits
    assert relative_error(logits, expected) < 1e-4


def check_vocab_groups(mesh: DeviceMesh) -> None:
    """The same batch on every rank: rows of a VocabParallelClassifier, or of a DTensor."""
    batch = {name: whole_batch.flip(0) for name, whole_batch in batch_of_all().items()}
    stock = model_of()
    expected = stock(**batch).loss
    expected.backward()
    for sharded in (True, False):
        model = model_of()
        if sharded:
            model.lm_head = VocabParallelClassifier.from_linear(model.lm_head, mesh.get_group())
            rows = slice(model.lm_head.start, model.lm_head.stop)
        else:
            weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
            model.lm_head.weight = nn.Parameter(weight)
            rows = slice(None)
        use_vocab_parallel_loss(model)
        loss = model(**batch).loss
        loss.backward()
        assert relative_error(loss, expected) < 1e-6
        for (name, ours), want in zip(model.named_parameters(), stock.parameters(), strict=True):
            mine = slice(None) if name != "lm_head.weight" else rows
            assert relative_error(whole(ours.grad), want.grad[mine]) < 1e-5, name
        if sharded:
            with torch.no_grad():
                with pytest.raises(ValueError, match=r"whole logits .* set pipeline_mode=False"):
                    model(**batch).logits.argmax(-1)
                model.lm_head.pipeline_mode = False
                assert relative_error(model(**batch).logits, stock(**batch).logits) < 1e-6
        unlike = own_batches()[0]  # what data-parallel ranks would have
        use_vocab_parallel_loss(model, validate=None)
        model.forward.agreed = False
        with pytest.raises(ValueError, match="ranks of the vocab group"):
            model(**unlike)


def batch_of_all() -> dict[str, Tensor]:
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": ids}


def check_mesh(mesh: DeviceMesh) -> None:
    """Rows over data-parallel ranks, under DDP and FSDP2: as DDP trains the whole model."""
    batches, size = own_batches(), dist.get_world_size()
    for tied, more in ((False, {}), (True, {"num_items_in_batch": 37})):
        given = [{**batch, **more} for batch in batches]
        stock_model = model_of(tied)
        stock = run(DistributedDataParallel(stock_model), stock_model, given)
        for body in ("ddp", "fsdp"):
            model = model_of(tied)
            use_vocab_parallel_loss(model, mesh=mesh)
            assert len(set(model.parameters())) == len(set(stock_model.parameters()))
            rows = model.lm_head.weight.to_local().shape[0]
            assert rows == min(-(-97 // size), 97 - dist.get_rank() * -(-97 // size))
            if body == "ddp":
                wrapped: Any = DistributedDataParallel(model)
            else:
                units(model, True, False, mesh=mesh, ignored_params={model.lm_head.weight})
                wrapped = model
            found = run(wrapped, model, given)
            assert type(model.lm_head.weight.to_local()) is Tensor
            check_equal(found, stock)
            if body == "ddp":  # FSDP2 takes no copies
                check_copied(model, batches[0])
    check_logits_of_rows(wrapped, model, batches[0])
    check_undone(model, stock)


def check_logits_of_rows(wrapped: nn.Module, model: Any, batch: Any) -> None:
    """Without labels, and on request, they are whole; their gradient is the mean over the ranks."""
    same = model_of(tied=True)
    names = {name: whole(own.detach()) for name, own in model.named_parameters()}
    same.load_state_dict(names, strict=False)  # without lm_head.weight, which is tied
    reference = DistributedDataParallel(same)
    ids = batch["input_ids"]
    for module in (wrapped, reference):
        module.zero_grad()
        module(ids).logits.square().sum().backward()
    ours, want = model.lm_head.weight.grad, same.lm_head.weight.grad
    assert relative_error(whole(ours), want) < 1e-5
    with torch.no_grad():
        assert relative_error(wrapped(**batch).logits, same(**batch).logits) < 1e-5


def check_copied(model: Any, batch: Any) -> None:
    """Copies and pickles hold this rank's rows, on the same mesh."""
    expected = model(**batch).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch).loss, expected)


def check_undone(model: Any, stock: Any) -> None:
    """Saved whole by every rank together, and whole again by the undo; transformers opens it."""
    options = whole_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = whole_state.get_model_state_dict(model, options=options)
    with tempfile.TemporaryDirectory() as folder:
        if dist.get_rank() == 0:
            model.save_pretrained(folder, state_dict=state)
            again = AutoModelForCausalLM.from_pretrained(folder)
            check_parameters(again, stock)
        dist.barrier()
    remove_vocab_parallel_loss(model)
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding
    assert model.model.embed_tokens.weight is model.lm_head.weight
    assert relative_error(model.lm_head.weight, stock[1]["model.embed_tokens.weight"]) < 1e-5


def check_parameters(model: nn.Module, stock: Any) -> None:
    for name, own in model.named_parameters():
        assert relative_error(own, stock[1][name]) < 1e-5, name


def check_resumed(mesh: DeviceMesh) -> None:
    """Model and optimizer by torch's own functions: whole in a file, each rank its rows again."""
    batches = own_batches()
    ends = []
    for stops in (False, True):
        model = model_of()
        use_vocab_parallel_loss(model, mesh=mesh)
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(wrapped.parameters(), 1e-2)
        for index, batch in enumerate(batches):
            if stops and index == 1:
                options = whole_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
                states = whole_state.get_state_dict(model, optimizer, options=options)
                if dist.get_rank() == 0:
                    moments = states[1]["state"]["lm_head.weight"]["exp_avg"]
                    assert moments.shape == (97, 32)
                model = model_of()
                use_vocab_parallel_loss(model, mesh=mesh)
                wrapped = DistributedDataParallel(model)
                optimizer = torch.optim.AdamW(wrapped.parameters(), 1e-2)
                options.broadcast_from_rank0 = True
                whole_state.set_model_state_dict(model, states[0], options=options)
                whole_state.set_optimizer_state_dict(model, optimizer, states[1], options=options)
            wrapped(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moment = optimizer.state[model.lm_head.weight]["exp_avg"]
        assert moment.to_local().shape == model.lm_head.weight.to_local().shape
        ends.append([whole(own.detach()).clone() for own in model.parameters()])
    for ours, want in zip(*ends, strict=True):  # DDP sums anew in another order
        assert relative_error(ours, want) < 1e-6


def check_refused(mesh: DeviceMesh) -> None:
    """On every rank, before anything is communicated; the model stays as it was."""

    def refuse(model: Any, words: str, **more: Any) -> None:
        with pytest.raises(ValueError, match=words):
            use_vocab_parallel_loss(model, mesh=more.get("mesh", mesh))

    size = dist.get_world_size()
    wide = init_device_mesh("cpu", (1, size), mesh_dim_names=("a", "b"))
    refuse(model_of(), "a mesh of one axis over all", mesh=wide)
    refuse(model_of(), "a mesh of one axis over all", mesh=wide["a"])
    refuse(tiny("gemma2"), "got Gemma2TextScaledWordEmbedding with Parameter")
    refuse(DistributedDataParallel(model_of()), "before DDP wraps it")
    model = model_of()
    units(model, True, True, mesh=mesh)
    refuse(model, "a plain nn.Linear as the classifier, .* got FSDPLinear")
    model = model_of()
    use_vocab_parallel_loss(model)
    refuse(model, "a model that is not changed yet")
    assert model(**batch_of_all()).logits is None


def check_peft(mesh: DeviceMesh) -> None:
    """Adapters of the body beside rows of a frozen classifier, wrapped before and after."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False
    )
    batches = own_batches()

    def adapted(change: Callable[[Any], None], first: bool) -> Any:
        model = model_of()
        if first:
            change(model)
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, config)
        if not first:
            change(wrapped)
        return run(DistributedDataParallel(wrapped), wrapped, batches)

    stock = adapted(lambda model: None, True)
    for first in (True, False):
        check_equal(adapted(lambda model: use_vocab_parallel_loss(model, mesh=mesh), first), stock)
    for more in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        model = model_of()
        use_vocab_parallel_loss(model, mesh=mesh)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **more})
        with pytest.raises(ValueError, match="leave it out of PEFT's target_modules"):
            peft.get_peft_model(model, config)(**batches[0])


def check_trainer(folder: str, cases: list[dict[str, Any]]) -> None:
    """Trainer's own loop under DDP: the model unchanged, changed, and with its rows spread."""
    for number, given in enumerate(cases):
        logs = {}
        for way in ("stock", "whole", "rows"):
            model = model_of()
            if way != "stock":
                spread = init_device_mesh("cpu", (dist.get_world_size(),))
                use_vocab_parallel_loss(model, mesh=spread if way == "rows" else None)
            place = Path(folder) / f"{number}{way}"
            logs[way] = trained(model, place, max_grad_norm=0.5, **given)[0]
        exact = logs["stock"]
        if given.get("bf16"):
            exact = trained(model_of(), Path(folder) / "exact", max_grad_norm=0.5)[0]
        for way in ("whole", "rows"):
            if given.get("bf16"):
                compare_rounded(logs[way], logs["stock"], exact)
            else:
                compare(logs[way], exact, 1e-6)


def check_trainer_resumes(folder: str, mesh: DeviceMesh) -> None:
    """Trainer's own checkpoints of spread rows: whole ones, of which each rank takes its rows."""
    ends = []
    for name, stops in (("one group", [2, 4]), ("whole", [4]), ("parts", [2, 4])):
        for index, stop in enumerate(stops):
            model = model_of(tied=True)
            more: dict[str, Any] = {"callbacks": [WholeRowsCallback()]}
            if name != "one group" or index == 0:
                use_vocab_parallel_loss(model, mesh=mesh)
            if name == "one group":  # goes on without a mesh
                own = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0, foreach=False)
                more["optimizers"] = (own, None)
            logged, _ = trained(
                model, Path(folder) / name, resume=index > 0, max_steps=stop, save_steps=2,
                save_strategy="steps", lr_scheduler_type="constant", more=more,
            )  # fmt: skip
        ends.append([logged, *(whole(own.detach()).clone() for own in model.parameters())])
    for end in ends[1:]:
        compare(end[0], ends[0][0], 1e-6)
        for ours, want in zip(end[1:], ends[0][1:], strict=True):
            assert relative_error(ours, want) < 1e-6
    saved = Path(folder) / "parts" / "checkpoint-4"
    again: Any = AutoModelForCausalLM.from_pretrained(saved)
    remove_vocab_parallel_loss(model)
    for (name, ours), want in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, want), name
    moments = torch.load(saved / "optimizer.pt", weights_only=True)["state"].values()
    shapes = [tuple(own["exp_avg"].shape) for own in moments]
    assert sorted(shapes) == sorted(tuple(own.shape) for own in model.parameters())


def check_accelerate(mesh: DeviceMesh) -> None:
    """Accelerate's own loop, with its clipping and its accumulation."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    losses: dict[str, list[Tensor]] = {}
    for way in ("stock", "whole", "rows"):
        model = model_of()
        if way != "stock":
            use_vocab_parallel_loss(model, mesh=mesh if way == "rows" else None)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        kept = losses[way] = []
        for batch in [*own_batches(1), *own_batches(2)[:1]]:
            with accelerator.accumulate(prepared):
                loss = prepared(**batch).loss
                accelerator.backward(loss)
                kept.append(loss.detach())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
                    kept.append(whole(norm))
                optimizer.step()
                optimizer.zero_grad()
        assert len(kept) == 6
    for way in ("whole", "rows"):
        for ours, want in zip(losses[way], losses["stock"], strict=True):
            assert relative_error(ours, want) < 1e-6, way


def check_models() -> None:
    warnings.simplefilter("ignore")  # PEFT's own
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    check_refused(mesh)
    check_whole_classifiers(mesh)
    check_vocab_groups(mesh)
    check_mesh(mesh)
    check_resumed(mesh)
    check_peft(mesh)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_models(ranks: int) -> None:
    run_ranks(check_models, ranks)


def check_trainers(folder: str, cases: list[dict[str, Any]]) -> None:
    warnings.simplefilter("ignore")  # Trainer's and accelerate's own
    gc.freeze()  # Trainer collects garbage often, which takes longer than what it trains here
    check_accelerate(init_device_mesh("cpu", (dist.get_world_size(),)))
    check_trainer(folder, cases)
    check_trainer_resumes(folder, init_device_mesh("cpu", (dist.get_world_size(),)))


ACCUMULATION = {"gradient_accumulation_steps": 2}
APART = {"average_tokens_across_devices": False}
CASES: list[dict[str, Any]] = [{**ACCUMULATION}, {**APART}]
MORE: list[dict[str, Any]] = [
    {},
    {**ACCUMULATION, **APART},
    {"gradient_accumulation_steps": 4},
    {"gradient_checkpointing": True},
    {"bf16": True},
    {"label_smoothing_factor": 0.1},
]


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, CASES),
        pytest.param(2, MORE, marks=pytest.mark.slow),
        pytest.param(3, CASES + MORE, marks=pytest.mark.slow),
    ],
)
def test_trainers(ranks: int, cases: list[dict[str, Any]], tmp_path: Path) -> None:
    run_ranks(
        check_trainers,
        ranks,
        timeout=55 if cases is CASES else 300,
        folder=str(tmp_path),
        cases=cases,
    )
