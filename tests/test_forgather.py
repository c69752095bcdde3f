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
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
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
    linear_cross_entropy,
    sum_over_columns,
)
from vocab_parallel.adapters import shard_output_embeddings

VOCABULARY, HIDDEN, MICROBATCHES, ACCUMULATION = 97, 16, 2, 2
OURS = functools.partial(CCEPipelineLoss, scaled_outside=True)


class GeneratedModel(nn.Module):
    """Built as its generated models are: a body, a head, and what the trainer asks of both."""

    can_return_hidden_states = True

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Module | None = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleDict({str(i): nn.Linear(HIDDEN, HIDDEN) for i in range(2)})
        self.lm_head: Any = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.register_buffer("scale", torch.tensor(1.25), persistent=False)

    def get_output_embeddings(self) -> Any:
        if not self.lm_head or isinstance(self.lm_head, nn.Linear):
            return self.lm_head
        return self.lm_head.get_output_embeddings()

    def set_output_embeddings(self, module: nn.Module) -> None:
        self.lm_head = module

    def forward(self, inputs: Tensor, return_hidden_states: bool | None = None) -> Tensor:
        hidden = inputs if self.embedding is None else self.embedding(inputs)
        for layer in self.layers.values():
            hidden = self.scale * layer(hidden).tanh()
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


class CheckpointManager:
    """What its manager writes and reads: a file of a stage's weights, one of its optimizer."""

    def __init__(
        self, config: Any, dist: Any, stateful_provider: Any, model: Any, model_parts: Any = None,
        model_preprocessor: Any = None, shard_index: Any = None,
    ) -> None:  # fmt: skip
        self.config, self.dist, self.stateful_provider = config, dist, stateful_provider
        self.model, self.model_parts, self.shard_index = model, model_parts, shard_index
        self.model_preprocessor = model_preprocessor

    def _should_save_unique(self) -> bool:
        return bool(self.dist.rank == 0)

    def save_checkpoint(self, checkpoint_path: str) -> None:
        if self._should_save_unique():
            Path(checkpoint_path).mkdir()  # an error where two do
        dist.barrier()
        self._save_model(checkpoint_path)
        for key, obj in self.stateful_provider.get_statefuls_for_save().items():
            self._save_state_dict(key, obj, checkpoint_path)
        dist.barrier()

    def load_checkpoint(self, checkpoint_path: str) -> None:
        index = json.loads(Path(checkpoint_path, "index.json").read_text())
        for part in self.model_parts:
            for file in {index[name] for name in part.state_dict()}:
                part.load_state_dict(torch.load(Path(checkpoint_path, file)), strict=False)
        for key, obj in self.stateful_provider.get_statefuls_for_save().items():
            obj.load_state_dict(torch.load(Path(checkpoint_path, self._dict_name(key))))

    def _save_model(self, output_dir: str) -> None:
        if self._should_save_unique():
            Path(output_dir, "index.json").write_text(json.dumps(self.shard_index))
        for part in self.model_parts:
            state = part.state_dict()
            (file,) = {self.shard_index[name] for name in state}
            with Path(output_dir, file).open("xb") as stream:  # an error where two write
                torch.save(state, stream)

    def _dict_name(self, key: str) -> str:
        return f"{key}_state_rank_{self.dist.rank}.pt"

    def _save_state_dict(self, key: str, obj: Any, output_dir: str) -> None:
        with Path(output_dir, self._dict_name(key)).open("xb") as stream:
            torch.save(obj.state_dict(), stream)


class PipelineTrainer:
    """What the trainer does on one rank, by its own names, for one column of ranks."""

    def __init__(
        self, *, distributed_env: Any, model_splitter: Any, fused_loss_factory: Any,
        pipe_schedule_factory: Any = ScheduleGPipe, fuse_optim_with_backward: bool = False,
    ) -> None:  # fmt: skip
        fused = fuse_optim_with_backward
        self.args: Any = SimpleNamespace(seed=0, fuse_optim_with_backward=fused)
        self.dist, self.model_splitter = distributed_env, model_splitter
        self.fused_loss_factory = fused_loss_factory
        self.pipe_schedule_factory = pipe_schedule_factory
        self._post_init()
        self._prepare_model()
        (module,) = self.pipeline_modules
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        self.checkpoint_manager = self._init_checkpoint_manager()

    def _post_init(self) -> None:
        self.is_world_process_zero = self.dist.rank == 0
        self.pp_group = self.dist.pp_group

    def _construct_model(self, device: str) -> GeneratedModel:
        with torch.device(device):
            return GeneratedModel()

    def _split_model(self, model: Any, stage_indices: Any) -> Any:
        return self.model_splitter(
            model, (), {}, stage_indices, True,
            device=torch.device("cpu"), rank=self.dist.rank, pp_group=self.pp_group,
        )[:3]  # fmt: skip

    @torch.no_grad()
    def _initialize_params(self, _: Any, modules: Any, *__: Any) -> None:
        torch.manual_seed(self.args.seed)
        whole = self._construct_model("cpu")
        (module,) = modules
        module.load_state_dict({name: whole.state_dict()[name] for name in module.state_dict()})
        module.scale.copy_(whole.scale)

    def _prepare_model(self) -> None:
        indices = [(i,) for i in range(self.dist.world_size)]
        self.model = self._construct_model("meta")
        every, self.pipeline_modules, (stage,) = self._split_model(self.model, indices)
        (module,) = self.pipeline_modules
        module.to_empty(device="cpu")
        self._initialize_params(every, self.pipeline_modules, indices, False)
        self.shard_index = {
            name: f"model-{i}.bin" for i, part in enumerate(every) for name in part.state_dict()
        }
        self.pp_last_stage_rank = len(indices) - 1
        self.is_first = self.dist.rank == 0
        self.is_last = self.dist.rank == self.pp_last_stage_rank
        self.loss_fn: Any = causal_loss
        if (
            self.is_last
            and hasattr(module, "get_output_embeddings")
            and getattr(module, "can_return_hidden_states", False)
        ):
            self.loss_fn = self.fused_loss_factory(module.get_output_embeddings())
        self.loss_fn = Rescaled(self.loss_fn, 1 / MICROBATCHES)
        self.loss_fn = Rescaled(self.loss_fn, 1 / ACCUMULATION)
        schedule = self.pipe_schedule_factory
        self.schedule = schedule(stage, MICROBATCHES, loss_fn=self.loss_fn, scale_grads=False)

    def _init_checkpoint_manager(self) -> Any:
        return CheckpointManager(
            None, self.dist, self, self.model, self.pipeline_modules, None, self.shard_index
        )

    def get_statefuls_for_save(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer}

    def _distributed_loss(self, loss: Tensor) -> Tensor:
        dist.broadcast(loss, group=self.pp_group, group_src=self.pp_last_stage_rank)
        return loss

    def _clip_grad_norm(self, max_grad_norm: float) -> Tensor:
        parameters = list(self.pipeline_modules[0].parameters())
        squares = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]) ** 2
        dist.all_reduce(squares, group=self.pp_group)
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, squares.sqrt())
        return squares.sqrt()

    def train(self, ids: Tensor) -> list[float]:  # (steps, accumulation, b, T)
        """Return each step's loss and gradient norm."""
        found = []
        for batches in ids:
            losses = [self.step(batch, uneven_labels(batch)) for batch in batches]
            found.append(float(self._distributed_loss(torch.stack(losses).sum())))
            found.append(float(self._clip_grad_norm(0.3)))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return found

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


def column_of(groups: StageGroups) -> Any:
    """Its distributed environment, for a column of a mesh."""
    return SimpleNamespace(
        rank=groups.pipeline_rank, world_size=groups.pipeline_degree, pp_group=groups.pipeline_group
    )


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
    trainer = PipelineTrainer(
        distributed_env=column_of(groups), model_splitter=splitter, fused_loss_factory=factory,
        pipe_schedule_factory=schedule,
    )  # fmt: skip
    (module,) = trainer.pipeline_modules
    head = module.get_output_embeddings()
    assert isinstance(head, VocabParallelClassifier) == (vocab > 1 and trainer.is_last)
    names = dict(module.named_parameters())  # those of the whole model
    rows = slice(head.start, head.stop) if vocab > 1 and trainer.is_last else slice(None)

    def own_part(name: str, tensor: Tensor) -> Tensor:
        return tensor[rows] if name == "lm_head.weight" else tensor

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
        sum_over_columns(module, groups)
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
            assert relative_error(module(ids[0, 0]), whole(ids[0, 0])) < 1e-6
    dist.barrier()


def check_over_ranks() -> None:
    check_mesh(2, 1, "replicated", Schedule1F1B)
    check_mesh(1, 2, "replicated", ScheduleGPipe)
    check_mesh(1, 2, "sharded", Schedule1F1B)


def test_over_ranks() -> None:
    run_ranks(check_over_ranks, 2)


def vocab_trainer() -> Any:
    """Return ours; of the double where Forgather's own was not imported."""
    folder = "forgather.ml.trainer"
    for name, content in {
        **dict.fromkeys(("forgather", "forgather.ml", folder, f"{folder}.pipeline")),
        f"{folder}.checkpoint_manager": CheckpointManager,
        f"{folder}.pipeline.pipeline_trainer": PipelineTrainer,
    }.items():
        sys.modules[name] = ModuleType(name)
        if content is not None:
            setattr(sys.modules[name], content.__name__, content)
    from vocab_parallel.forgather import VocabPipelineTrainer

    return VocabPipelineTrainer


def whole_state(trainer: Any) -> dict[str, Tensor]:
    """Return weights and moments by name, with all rows; all ranks of a mesh call it."""
    (module,) = trainer.pipeline_modules
    head, state = module.get_output_embeddings(), {}
    for name, parameter in module.named_parameters():
        moments = trainer.optimizer.state[parameter]
        for kind, value in {"weight": parameter.detach(), **moments}.items():
            is_rows = isinstance(head, VocabParallelClassifier) and name.startswith("lm_head")
            # An optimizer takes its rows of whole moments at its next step.
            is_own = is_rows and value.dim() > 0 and len(value) != VOCABULARY
            state[f"{name} {kind}"] = (head.gather_rows(value) if is_own else value).clone()
    return state


def check_checkpoints(folder: str) -> None:
    """Two columns save, and two and one resume; one saves, and two resume."""
    cls, ids = vocab_trainer(), torch.randint(VOCABULARY, (4, ACCUMULATION, 4, 9))
    dist.broadcast(ids, 0)
    mesh = SimpleNamespace(rank=dist.get_rank(), world_size=4, device="cpu", pp_group=None)

    def two_columns(**changed: Any) -> Any:
        given = {"distributed_env": mesh, "vocab_degree": 2, "fused_loss_factory": OURS, **changed}
        return cls(model_splitter=split_by_deletion, **given)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*never validated")
        trainer = two_columns()
        first = trainer.train(ids[:2])
        saved = whole_state(trainer)
        trainer.checkpoint_manager.save_checkpoint(f"{folder}/two")
        losses, end = trainer.train(ids[2:]), whole_state(trainer)
        assert first != losses

        resumed = two_columns()
        resumed.checkpoint_manager.load_checkpoint(f"{folder}/two")
        assert_equal(whole_state(resumed), saved)
        assert resumed.train(ids[2:]) == losses
        assert_equal(whole_state(resumed), end)

        one = PipelineTrainer(  # each column by itself, as its own trainer would
            distributed_env=column_of(trainer.groups), model_splitter=split_by_deletion,
            fused_loss_factory=OURS,
        )  # fmt: skip
        one.checkpoint_manager.load_checkpoint(f"{folder}/two")
        assert_equal(whole_state(one), saved)
        assert one.train(ids[2:]) == pytest.approx(losses, rel=1e-6)
        one.checkpoint_manager.save_checkpoint(f"{folder}/one{trainer.groups.vocab_rank}")
        resumed.checkpoint_manager.load_checkpoint(f"{folder}/one0")
        assert_equal(whole_state(resumed), whole_state(one))
    if resumed.is_last:
        head = resumed.pipeline_modules[0].lm_head
        moment = resumed.optimizer.state[head.weight]["exp_avg"]
        assert head.weight.shape == moment.shape == (head.stop - head.start, HIDDEN)
        assert head.stop - head.start < VOCABULARY

    sharded = functools.partial(OURS, hidden_layout="sharded")
    for changed, match in (
        ({"fused_loss_factory": None}, "expected a fused_loss_factory"),
        (
            {"fused_loss_factory": sharded},
            "got CCE.*sharded",
        ),
        ({"fused_loss_factory": lambda _: causal_loss}, "got function"),
        ({"vocab_degree": 3}, "does not divide 4 ranks"),
        ({"fuse_optim_with_backward": True}, "fuse_optim_with_backward"),
    ):
        with pytest.raises(ValueError, match=match):
            two_columns(**changed)
    GeneratedModel.can_return_hidden_states = False
    with pytest.raises(ValueError, match="can_return_hidden_states"):
        two_columns()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(found) >= 4 * 2  # weight, step and two moments of two layers
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_checkpoints_are_whole(tmp_path: Path) -> None:
    run_ranks(check_checkpoints, 4, folder=str(tmp_path))


def test_output_embeddings_are_the_head_itself() -> None:
    head = VocabParallelClassifier.from_linear(nn.Linear(8, 11), None)
    model = GeneratedModel()
    model.lm_head = head
    assert model.get_output_embeddings() is head
    e, targets = torch.randn(5, 8), torch.randint(11, (5,))
    found = CCEPipelineLoss(model.get_output_embeddings(), shift=0)(e, targets)
    assert relative_error(found, linear_cross_entropy(e, head.weight, targets, head.bias)) < 1e-6


class Ids(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences with uneven labels, so many that its trainer resumes within an epoch."""

    def __init__(self) -> None:
        self.ids = torch.randint(VOCABULARY, (48, 9), generator=torch.Generator().manual_seed(0))
        self.labels = uneven_labels(self.ids.unflatten(0, (-1, 4))).flatten(0, 1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def trainers() -> Any:
    """Return its trainer and ours, each of which records what it does."""
    warnings.simplefilter("default")  # its own warnings are its own
    from forgather.ml.trainer.pipeline.pipeline_trainer import PipelineTrainer

    from vocab_parallel.forgather import VocabPipelineTrainer

    class Recording:
        def _train_step(self, *args: Any, **kwargs: Any) -> Any:
            loss, norm = super()._train_step(*args, **kwargs)  # type: ignore[misc]
            self.found = [*getattr(self, "found", []), float(loss), float(norm)]
            return loss, norm

        def _eval_loop(self) -> Any:
            metrics = super()._eval_loop()  # type: ignore[misc]
            self.found.append(float(metrics["eval_loss"]))
            return metrics

    class Recorded(Recording, PipelineTrainer):  # type: ignore[misc, valid-type]
        pass

    class Mesh(Recording, VocabPipelineTrainer):  # type: ignore[misc]
        pass

    return Recorded, functools.partial(Mesh, vocab_degree=2)


def seeded_model() -> GeneratedModel:
    torch.manual_seed(2)  # a loader draws a number before its trainer makes the weights
    return GeneratedModel()


def trained(cls: Any, factory: Any, folder: str, **changed: Any) -> Any:
    """Return a trainer after four steps of two batches each, and two evaluations."""
    from forgather.ml.distributed import DistributedEnvironment
    from forgather.ml.trainer.pipeline.pipeline_trainer import PipelineTrainingArguments

    arguments = PipelineTrainingArguments(
        output_dir=folder, use_cpu=True, device="cpu", seed=1, max_steps=4, num_train_epochs=8,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, n_microbatches=2,
        gradient_accumulation_steps=2, max_grad_norm=0.3, learning_rate=1e-2,
        eval_strategy="steps", eval_steps=2, dataloader_pin_memory=False,
        **{"save_strategy": "no", **changed},
    )  # fmt: skip
    trainer = cls(
        args=arguments, distributed_env=DistributedEnvironment(), callbacks=[],
        model_init=seeded_model, model_splitter=split_by_deletion,
        pipe_schedule_factory=ScheduleGPipe, train_dataset=Ids(), eval_dataset=Ids(),
        compute_loss_func=causal_loss, fused_loss_factory=factory,
        lr_scheduler_factory=functools.partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
    )  # fmt: skip
    trainer.train()
    assert trainer.use_fused_loss == (factory is not None and trainer.pp_has_last_stage)
    assert len(trainer.found) == (4 * 2 + 2) // (2 if "resume_from_checkpoint" in changed else 1)
    return trainer


def check_its_own_trainer(folder: str) -> None:
    """Its trainer, unchanged, on a pipeline of two: our loss beside its own."""
    recorded, _ = trainers()
    expected = trained(recorded, None, folder).found
    assert trained(recorded, OURS, folder).found == pytest.approx(expected, rel=1e-6)
    Path(folder, "expected.json").write_text(json.dumps(expected))


SAVES = {"save_strategy": "steps", "save_steps": 2}


def check_a_mesh(folder: str, safetensors: bool) -> None:
    """The same on two stages of two ranks, each of which has half of the last one's rows."""
    expected = json.loads(Path(folder, "expected.json").read_text())
    _, mesh_trainer = trainers()
    saves = {**SAVES, "save_safetensors": safetensors}
    trainer = trained(mesh_trainer, OURS, f"{folder}/two", **saves)
    assert trainer.found == pytest.approx(expected, rel=1e-6)
    head = trainer.pipeline_modules[-1].get_output_embeddings()
    assert isinstance(head, VocabParallelClassifier) == trainer.pp_has_last_stage
    dist.barrier()

    path = f"{folder}/two/checkpoints/checkpoint-2"
    resumed = trained(mesh_trainer, OURS, f"{folder}/again", **saves, resume_from_checkpoint=path)
    assert resumed.found == trainer.found[5:]
    end = whole_state(trainer)
    assert_equal(whole_state(resumed), end)
    if trainer.groups.vocab_rank == 0:
        torch.save(end, f"{folder}/end{trainer.dist.rank}.pt")


def check_one_column(folder: str) -> None:
    """Its own trainer resumes what two columns saved, and its end is theirs."""
    recorded, _ = trainers()

    class Loading(recorded):  # type: ignore[misc, valid-type]
        def load_checkpoint(self, checkpoint_path: Any = None) -> None:
            super().load_checkpoint(checkpoint_path)
            self.loaded = whole_state(self)

    path = f"{folder}/two/checkpoints/checkpoint-"
    expected = json.loads(Path(folder, "expected.json").read_text())
    trainer = trained(Loading, OURS, f"{folder}/one", **SAVES, resume_from_checkpoint=f"{path}2")
    assert trainer.found == pytest.approx(expected[5:], rel=1e-6)
    trainer.load_checkpoint(f"{path}4")
    assert_equal(trainer.loaded, torch.load(f"{folder}/end{dist.get_rank()}.pt"))


def test_its_own_trainer(tmp_path: Path) -> None:
    pytest.importorskip("forgather.ml.trainer.pipeline", reason="needs Forgather, from its source")
    run_ranks(check_its_own_trainer, 2, folder=str(tmp_path))
    for safetensors in (False, True):
        folder = tmp_path / str(safetensors)
        folder.mkdir()
        (folder / "expected.json").write_bytes((tmp_path / "expected.json").read_bytes())
        run_ranks(check_a_mesh, 4, folder=str(folder), safetensors=safetensors)
        run_ranks(check_one_column, 2, folder=str(folder))
