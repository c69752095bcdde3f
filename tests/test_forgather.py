"""The loss in a double of Forgather's pipeline trainer, written after its source (February 2026).

The double does what its trainer does around the loss: it finds the head by asking the last stage's
module, wraps the loss in two divisions, of which an evaluation leaves out the outer one, sets no
divisor, and calls the schedule with keyword arguments for every stage. Where Forgather can be
imported its own trainer is run too.
"""

import contextlib
import copy
import functools
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from stage_groups import StageGroups, build_stage_groups
from tests.oracle import relative_error
from tests.ranks import run_ranks
from vocab_parallel import (
    CCEPipelineLoss,
    VocabParallelClassifier,
    clip_grad_norm_,
    linear_cross_entropy,
    sum_over_columns,
)
from vocab_parallel.adapters import shard_output_embeddings

VOCABULARY, HIDDEN, MICROBATCHES, ACCUMULATION = 97, 16, 2, 2


class GeneratedModel(nn.Module):
    """Built as its generated models are: a body, a head, and what the trainer asks of both."""

    can_return_hidden_states = True

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Module | None = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleDict({str(i): nn.Linear(HIDDEN, HIDDEN) for i in range(2)})
        self.lm_head: Any = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def get_output_embeddings(self) -> Any:
        if not self.lm_head or isinstance(self.lm_head, nn.Linear):
            return self.lm_head
        return self.lm_head.get_output_embeddings()

    def set_output_embeddings(self, module: nn.Module) -> None:
        self.lm_head = module

    def forward(self, inputs: Tensor, return_hidden_states: bool | None = None) -> Tensor:
        hidden = inputs if self.embedding is None else self.embedding(inputs)
        for layer in self.layers.values():
            hidden = layer(hidden).tanh()
        return hidden if return_hidden_states or not self.lm_head else self.lm_head(hidden)


def split_by_deletion(
    model: GeneratedModel, example_args: Any, example_kwargs: Any, stage_indices: Any, train: bool,
    device: Any, rank: int, pp_group: Any,
) -> Any:  # fmt: skip
    """A splitter of one column into as many stages as it has ranks, one or two."""
    modules, last = [], len(stage_indices) - 1
    for stage in range(last + 1):
        module = copy.deepcopy(model)
        if last == 1:
            module.layers.pop(str(1 - stage))
        if stage > 0:
            module.embedding = None
        if stage < last:
            module.lm_head = None
        modules.append(module)
    stages = [
        PipelineStage(modules[i], i, last + 1, device, group=pp_group) for i in stage_indices[rank]
    ]
    return modules, [modules[i] for i in stage_indices[rank]], stages, None


class Rescaled:
    """A loss times a factor, that may be switched off."""

    def __init__(self, loss: Any, factor: float) -> None:
        self.loss, self.factor, self.off = loss, factor, False
        functools.update_wrapper(self, loss, updated=())

    def __call__(self, *inputs: Any) -> Any:
        return self.loss(*inputs) * (1.0 if self.off else self.factor)

    @contextlib.contextmanager
    def no_rescale(self) -> Iterator[None]:
        self.off = True
        yield
        self.off = False


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The trainer's own loss."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class PipelineTrainer:
    """What the trainer does on one rank, for a column that is a part of a mesh."""

    def __init__(self, splitter: Any, groups: StageGroups, factory: Any, schedule: Any) -> None:
        with torch.device("meta"):
            model = GeneratedModel()
        indices = [(i,) for i in range(groups.pipeline_degree)]
        device, rank = torch.device("cpu"), groups.pipeline_rank
        _, (self.module,), (stage,), _ = splitter(
            model, (), {}, indices, True, device=device, rank=rank, pp_group=groups.pipeline_group
        )
        self.module.to_empty(device="cpu")
        self.is_first = rank == 0
        self.is_last = rank == len(indices) - 1
        self.loss_fn: Any = causal_loss
        if (
            self.is_last
            and hasattr(self.module, "get_output_embeddings")
            and getattr(self.module, "can_return_hidden_states", False)
        ):
            self.loss_fn = factory(self.module.get_output_embeddings())
        self.loss_fn = Rescaled(self.loss_fn, 1 / MICROBATCHES)
        self.loss_fn = Rescaled(self.loss_fn, 1 / ACCUMULATION)
        self.schedule = schedule(stage, MICROBATCHES, loss_fn=self.loss_fn, scale_grads=False)

    def step(self, ids: Tensor, labels: Tensor, *, evaluate: bool = False) -> Tensor:
        """Return the loss of a batch, 0 where it is not known."""
        targets, losses = (labels, []) if self.is_last else (None, None)
        run = self.schedule.eval if evaluate else self.schedule.step
        inputs = (ids,) if self.is_first else ()
        run(*inputs, return_hidden_states=True, target=targets, losses=losses)
        return torch.stack([each.detach() for each in losses or [torch.zeros(())]]).sum()


def uneven_labels(ids: Tensor) -> Tensor:
    """Return labels of which some sequences have few, so that microbatches have unlike counts."""
    labels = ids.clone()
    labels[..., 0, 2:] = -100
    labels[..., 1, 5:] = -100
    return labels


def check_mesh(pipeline: int, vocab: int, layout: Any, schedule: Any) -> None:
    """Two accumulated batches and an evaluation, against one process with its own loss."""
    groups = build_stage_groups(pipeline, vocab, device_type="cpu")
    torch.manual_seed(0)
    whole = GeneratedModel()
    columns = vocab if layout == "sharded" else 1
    ids = torch.randint(VOCABULARY, (ACCUMULATION, columns, 4, 9))
    labels = uneven_labels(ids)
    counts = (labels[..., 1:] != -100).unflatten(2, (MICROBATCHES, -1)).sum((-1, -2))
    assert (counts[..., 0] != counts[..., 1]).all()

    splitter = split_by_deletion
    if vocab > 1:
        splitter = shard_output_embeddings(
            split_by_deletion,
            pipeline_rank=groups.pipeline_rank,
            pipeline_group=groups.pipeline_group,
            vocab_group=groups.vocab_group,
        )
    factory = functools.partial(CCEPipelineLoss, hidden_layout=layout, scaled_outside=True)
    trainer = PipelineTrainer(splitter, groups, factory, schedule)
    head = trainer.module.get_output_embeddings()
    assert isinstance(head, VocabParallelClassifier) == (vocab > 1 and trainer.is_last)
    names = dict(trainer.module.named_parameters())  # those of the whole model
    rows = slice(head.start, head.stop) if vocab > 1 and trainer.is_last else slice(None)

    def own_part(name: str, tensor: Tensor) -> Tensor:
        return tensor[rows] if name == "lm_head.weight" else tensor

    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(own_part(name, whole.get_parameter(name)))

    def exact_losses(batch: int) -> list[Tensor]:
        """The mean of each microbatch, of all columns' sequences in it."""
        parts = zip(*(part[batch].chunk(MICROBATCHES, 1) for part in (ids, labels)), strict=True)
        return [causal_loss(whole(i.flatten(0, 1)), t.flatten(0, 1)) for i, t in parts]

    column = groups.vocab_rank if layout == "sharded" else 0
    for batch in range(ACCUMULATION):
        expected = torch.stack(exact_losses(batch)).sum() / MICROBATCHES / ACCUMULATION
        expected.backward()
        warned = pytest.warns(UserWarning, match="never validated")
        with warned if batch == 0 and trainer.is_last else contextlib.nullcontext():
            found = trainer.step(ids[batch, column], labels[batch, column])
        if trainer.is_last:
            assert relative_error(found, expected) < 1e-6
    if layout == "sharded":
        sum_over_columns(trainer.module, groups)
    for name, parameter in names.items():
        exact = own_part(name, whole.get_parameter(name).grad)
        assert relative_error(parameter.grad, exact) < 1e-5, name

    with trainer.loss_fn.no_rescale(), torch.no_grad():
        found = trainer.step(ids[0, column], labels[0, column], evaluate=True)
        if trainer.is_last:
            assert relative_error(found, torch.stack(exact_losses(0)).mean()) < 1e-6
    if vocab > 1:  # what a generation asks the head for
        head.pipeline_mode = False
        with torch.no_grad():
            assert relative_error(trainer.module(ids[0, 0]), whole(ids[0, 0])) < 1e-6
    dist.barrier()


def check_over_ranks() -> None:
    check_mesh(2, 1, "replicated", Schedule1F1B)
    check_mesh(1, 2, "replicated", ScheduleGPipe)
    check_mesh(1, 2, "sharded", Schedule1F1B)


def test_over_ranks() -> None:
    run_ranks(check_over_ranks, 2)


def test_output_embeddings_are_the_head_itself() -> None:
    head = VocabParallelClassifier.from_linear(nn.Linear(8, 11), None)
    model = GeneratedModel()
    model.lm_head = head
    assert model.get_output_embeddings() is head
    e, targets = torch.randn(5, 8), torch.randint(11, (5,))
    found = CCEPipelineLoss(model.get_output_embeddings(), shift=0)(e, targets)
    assert relative_error(found, linear_cross_entropy(e, head.weight, targets, head.bias)) < 1e-6


class Ids(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sixteen sequences with uneven labels."""

    def __init__(self) -> None:
        self.ids = torch.randint(VOCABULARY, (16, 9), generator=torch.Generator().manual_seed(0))
        self.labels = uneven_labels(self.ids.unflatten(0, (-1, 4))).flatten(0, 1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def trainers() -> Any:
    """Return its trainer, which records what it does, and one of a pipeline x vocab mesh."""
    warnings.simplefilter("default")  # its own warnings are its own
    from forgather.ml.trainer.pipeline.pipeline_trainer import PipelineTrainer

    class Recorded(PipelineTrainer):  # type: ignore[misc, valid-type]
        def _train_step(self, *args: Any, **kwargs: Any) -> Any:
            loss, norm = super()._train_step(*args, **kwargs)
            self.found = [*getattr(self, "found", []), float(loss), float(norm)]
            return loss, norm

        def _eval_loop(self) -> Any:
            metrics = super()._eval_loop()
            self.found.append(float(metrics["eval_loss"]))
            return metrics

    class MeshTrainer(Recorded):
        """What its trainer has to learn of two columns with the same sequences."""

        def _post_init(self) -> None:
            self.groups = build_stage_groups(self.dist.world_size // 2, 2, device_type="cpu")
            self.dist = copy.copy(self.dist)  # one column of the mesh
            self.dist.rank = self.groups.pipeline_rank
            self.dist.world_size = self.groups.pipeline_degree
            self.model_splitter = shard_output_embeddings(
                self.model_splitter,
                pipeline_rank=self.groups.pipeline_rank,
                pipeline_group=self.groups.pipeline_group,
                vocab_group=self.groups.vocab_group,
            )
            super()._post_init()
            self.pp_group = self.groups.pipeline_group

        @torch.no_grad()
        def _initialize_params(self, every: Any, modules: Any, *_: Any) -> None:
            """Every rank makes the whole model of the same seed, and takes its part."""
            torch.manual_seed(self.args.seed)
            whole = self._construct_model(device="cpu").state_dict()
            for module in modules:
                module.load_state_dict({name: whole[name] for name in module.state_dict()})

        def _distributed_loss(self, loss: Tensor) -> Tensor:
            group = self.groups.pipeline_group
            dist.broadcast(loss, dist.get_global_rank(group, self.pp_last_stage_rank), group)
            return loss

        def _clip_grad_norm(self, max_grad_norm: float | None, norm_type: float = 2.0) -> Tensor:
            stages = nn.ModuleList(self.pipeline_modules)
            return clip_grad_norm_(stages, max_grad_norm or math.inf, self.groups)

    return Recorded, MeshTrainer


def seeded_model() -> GeneratedModel:
    torch.manual_seed(2)  # a loader draws a number before its trainer makes the weights
    return GeneratedModel()


def trained(cls: Any, factory: Any, folder: str) -> Any:
    """Return a trainer after four steps of two batches each, and two evaluations."""
    from forgather.ml.distributed import DistributedEnvironment
    from forgather.ml.trainer.pipeline.pipeline_trainer import PipelineTrainingArguments

    arguments = PipelineTrainingArguments(
        output_dir=folder, use_cpu=True, device="cpu", seed=1, max_steps=4, num_train_epochs=8,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, n_microbatches=2,
        gradient_accumulation_steps=2, max_grad_norm=0.3, learning_rate=1e-2,
        save_strategy="no", eval_strategy="steps", eval_steps=2, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = cls(
        args=arguments, distributed_env=DistributedEnvironment(), callbacks=[],
        model_init=seeded_model, model_splitter=split_by_deletion,
        pipe_schedule_factory=ScheduleGPipe, train_dataset=Ids(), eval_dataset=Ids(),
        compute_loss_func=causal_loss, fused_loss_factory=factory,
    )  # fmt: skip
    trainer.train()
    assert trainer.use_fused_loss == (factory is not None and trainer.pp_has_last_stage)
    assert len(trainer.found) == 4 * 2 + 2
    return trainer


OURS = functools.partial(CCEPipelineLoss, scaled_outside=True)


def check_its_own_trainer(folder: str) -> None:
    """Its trainer, unchanged, on a pipeline of two: our loss beside its own."""
    recorded, _ = trainers()
    expected = trained(recorded, None, folder).found
    assert trained(recorded, OURS, folder).found == pytest.approx(expected, rel=1e-6)
    Path(folder, "expected.json").write_text(json.dumps(expected))


def check_a_mesh(folder: str) -> None:
    """The same on two stages of two ranks, each of which has half of the last one's rows."""
    expected = json.loads(Path(folder, "expected.json").read_text())
    _, mesh_trainer = trainers()
    trainer = trained(mesh_trainer, OURS, folder)
    assert trainer.found == pytest.approx(expected, rel=1e-6)
    head = trainer.pipeline_modules[-1].get_output_embeddings()
    assert isinstance(head, VocabParallelClassifier) == trainer.pp_has_last_stage


def test_its_own_trainer(tmp_path: Path) -> None:
    pytest.importorskip("forgather.ml.trainer.pipeline", reason="needs Forgather, from its source")
    run_ranks(check_its_own_trainer, 2, folder=str(tmp_path))
    run_ranks(check_a_mesh, 4, folder=str(tmp_path))
