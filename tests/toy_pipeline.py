"""A small model cut into stages, and the same model in one process, for every schedule."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from stage_groups import StageGroups
from tests.oracle import relative_error
from vocab_parallel import (
    CCEPipelineLoss,
    VocabParallelClassifier,
    count_valid_tokens,
    validate_pipeline_loss,
)

HIDDEN, LENGTH, BATCH, MICROBATCHES, PIPELINE = 6, 8, 4, 4, 2
SINGLE = ("GPipe", "1F1B")
LOOP = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
SCHEDULES = (*SINGLE, *LOOP, *V_SHAPED)


@dataclass(frozen=True)
class Setting:
    """One case of the matrix."""

    schedule: str
    scale_grads: bool = True
    layout: str = "replicated"
    vocabulary: int = 24
    static_shapes: bool = False
    dtensor: bool = False
    impl: str = "auto"
    dtype: str = "float64"
    adapter: bool = False  # the classifier is frozen, and has a LoRA adapter of PEFT's
    rows: tuple[int, ...] | None = None  # of each vocab rank

    @property
    def num_stages(self) -> int:
        return PIPELINE * (1 if self.schedule in SINGLE else 2)

    @property
    def style(self) -> str:
        return "v" if self.schedule in V_SHAPED else "loop"


class DTensorHead(nn.Module):
    """Owns the classifier as a DTensor over the vocab axis, and passes hidden states through."""

    logits_are_linear = True

    def __init__(self, whole: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = nn.Parameter(distribute_tensor(whole.weight.detach(), mesh, [Shard(0)]))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class ToyStage(nn.Module):
    """An embedding on the first stage, a layer on each, the classifier on the last."""

    def __init__(self, whole: nn.ModuleDict, index: int, head: nn.Module | None) -> None:
        super().__init__()
        self.embedding = whole["embedding"] if index == 0 else None
        self.layer = whole[f"layer{index}"]
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs if self.embedding is None else self.embedding(inputs)
        hidden = torch.tanh(self.layer(hidden))
        return hidden if self.head is None else self.head(hidden)


def toy_model(setting: Setting) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {f"layer{i}": nn.Linear(HIDDEN, HIDDEN) for i in range(setting.num_stages)}
    head: nn.Module = nn.Linear(HIDDEN, setting.vocabulary, bias=False)
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(setting.vocabulary, HIDDEN),
            **layers,
            "head": adapted(head) if setting.adapter else head,
        }
    ).to(getattr(torch, setting.dtype))


def adapted(linear: nn.Module) -> nn.Module:
    """Freeze a linear layer beside a LoRA adapter that does something."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    config = LoraConfig(r=3, lora_alpha=5, init_lora_weights=False)
    layer = Linear(linear, "default", config, r=3, lora_alpha=5)
    layer.base_layer.requires_grad_(False)
    return layer


def draw_batch(setting: Setting, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw tokens and labels (columns, BATCH, LENGTH); microbatches have unlike many labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(setting.vocabulary, (columns, BATCH, LENGTH), generator=generator)
    labels = tokens.clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[:, 1] = -100  # a microbatch of padding alone
    return tokens, labels


def one_process(
    setting: Setting, batches: list[tuple[Tensor, Tensor]]
) -> tuple[list[list[Tensor]], nn.ModuleDict]:
    """Return each step's microbatch losses and the model with the gradients of all steps."""
    model = toy_model(setting).double()
    every = []
    for tokens, labels in batches:
        count = int((labels[..., 1:] != -100).sum())
        losses = []
        for mb in range(MICROBATCHES):
            own = slice(mb * BATCH // MICROBATCHES, (mb + 1) * BATCH // MICROBATCHES)
            hidden = model["embedding"](tokens[:, own])
            for index in range(setting.num_stages):
                hidden = torch.tanh(model[f"layer{index}"](hidden))
            target = labels[:, own, 1:].reshape(-1)
            logits = model["head"](hidden)[:, :, :-1].reshape(-1, setting.vocabulary)
            loss = F.cross_entropy(logits, target, reduction="sum")
            own_count = max(int((target != -100).sum()), 1)
            loss = loss / (own_count if setting.scale_grads else count)
            (loss / (MICROBATCHES if setting.scale_grads else 1)).backward()
            losses.append(loss.detach())
        every.append(losses)
    return every, model


class Pipeline:
    """A rank's stages, its schedule and its loss."""

    def __init__(
        self,
        setting: Setting,
        groups: StageGroups,
        device: torch.device,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.setting, self.groups, self.device = setting, groups, device
        whole = toy_model(setting).to(device)
        last = setting.num_stages - 1
        self.indices = groups.stages(setting.num_stages, setting.style)
        self.has_last = groups.has_last_stage(setting.num_stages, setting.style)
        self.head: nn.Module | None = None
        if self.has_last and setting.dtensor:
            self.head = DTensorHead(whole["head"], groups.mesh["vocab"])
        elif self.has_last:
            self.head = VocabParallelClassifier.from_linear(
                whole["head"], groups.vocab_group, rows=setting.rows
            )
        self.modules = {
            index: ToyStage(whole, index, self.head if index == last else None)
            for index in self.indices
        }
        self.loss = (
            CCEPipelineLoss(self.head, hidden_layout=setting.layout, impl=setting.impl)
            if self.head is not None
            else _loss_of_another_stage
        )
        self.wrapped = {index: wrap(module) for index, module in self.modules.items()}
        stages = [self._stage(index) for index in self.indices]
        cls = torch_schedules.get_schedule_class(setting.schedule)
        self.schedule = cls(
            stages[0] if setting.schedule in SINGLE else stages,
            n_microbatches=MICROBATCHES,
            loss_fn=self.loss,
            scale_grads=setting.scale_grads,
        )
        validate_pipeline_loss(self.schedule, self.loss)

    def _stage(self, index: int) -> PipelineStage:
        setting, groups = self.setting, self.groups
        length = LENGTH // groups.vocab_degree if setting.layout == "sequence" else LENGTH
        size = BATCH // MICROBATCHES
        hidden = torch.empty(
            size, length, HIDDEN, dtype=getattr(torch, setting.dtype), requires_grad=True
        ).to(self.device)
        tokens = torch.zeros(size, length, dtype=torch.int64, device=self.device)
        shapes = {"input_args": hidden if index else tokens, "output_args": hidden}
        return PipelineStage(
            self.wrapped[index],
            index,
            setting.num_stages,
            self.device,
            group=groups.pipeline_group,
            **(shapes if setting.static_shapes else {}),
        )

    def own(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cut a batch (columns, ...) to what this rank feeds in."""
        rank, degree = self.groups.vocab_rank, self.groups.vocab_degree
        if self.setting.layout == "sharded":
            tokens, labels = tokens[rank], labels[rank]
        elif self.setting.layout == "sequence":
            tokens, labels = tokens[0].chunk(degree, -1)[rank].contiguous(), labels[0]
        else:
            tokens, labels = tokens[0], labels[0]
        return tokens.to(self.device), labels.to(self.device)

    def step(self, tokens: Tensor, labels: Tensor, *, evaluate: bool = False) -> list[Tensor]:
        """Run one step, or one evaluation; return the losses, empty off the last stage."""
        tokens, labels = self.own(tokens, labels)
        if self.has_last and not self.setting.scale_grads:
            groups = [self.groups.vocab_group] if self.setting.layout == "sharded" else []
            self.loss.num_valid_tokens = count_valid_tokens(labels, groups, shift=1)
        losses: list[Tensor] = []
        run = self.schedule.eval if evaluate else self.schedule.step
        run(
            *([tokens] if 0 in self.indices else []),
            target=labels if self.has_last else None,
            losses=losses if self.has_last else None,
            return_outputs=False,
        )
        return losses

    def compare_gradients(self, expected: nn.ModuleDict) -> dict[str, float]:
        """Return the relative error of every gradient of this rank."""
        errors = {}
        for index, module in self.modules.items():
            for name, parameter in module.named_parameters():
                gradient = parameter.grad
                if self.setting.adapter and name == "head.weight":
                    assert gradient is None, "it is frozen"
                    continue
                assert gradient is not None, (self.setting, index, name)
                is_dtensor = isinstance(gradient, DTensor)
                gradient = gradient.full_tensor() if is_dtensor else gradient
                if name == "head.lora_B":
                    want = expected["head"].lora_B["default"].weight.grad
                    want = want[self.head.start : self.head.stop]
                elif name == "head.weight":
                    want = expected["head"].weight.grad
                    want = want if is_dtensor else want[self.head.start : self.head.stop]
                else:
                    if self.setting.layout != "replicated":
                        gradient = gradient.clone()
                        dist.all_reduce(gradient, group=self.groups.vocab_group)
                    whole = name.replace("layer", f"layer{index}")
                    whole = whole.replace("lora_A", "lora_A.default.weight")
                    want = expected.get_parameter(whole).grad
                errors[f"{index}.{name}"] = relative_error(gradient.cpu(), want)
        return errors


def _loss_of_another_stage(*_: Tensor) -> Tensor:
    raise AssertionError("only the last stage computes the loss")
