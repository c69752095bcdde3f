"""The same first steps in one process, unsharded: does the mesh compute the same training?"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import trange

from launch.arguments import TrainArguments
from launch.data.batches import IGNORED, Batch, Batches
from launch.logit_settings import LogitSettings, logit_settings
from launch.model import CLASSIFIER, EMBEDDING, Stage, build_stage
from launch.optimizer import AdamW, LearningRate
from launch.sharded_body import named_gradients
from launch.training_pipeline import Pipeline, model_of

CHECKED_STEPS = 5
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """Relative differences between the mesh and one process.

    Attributes:
        losses: of each checked step, |a - b| / |b|.
        gradients: of step 1, by parameter, ||a - b|| / ||b||.
    """

    losses: list[float]
    gradients: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether every difference is within its tolerance; NaN is not."""
        return all(difference <= LOSS_TOLERANCE for difference in self.losses) and all(
            difference <= GRADIENT_TOLERANCE for difference in self.gradients.values()
        )


def compare_with_one_process(
    arguments: TrainArguments,
    batches: Batches,
    losses: list[float],
    gradients: dict[str, Tensor],
    device: torch.device,
) -> Comparison:
    """Run the first steps without a mesh, print the differences and return them.

    Args:
        arguments: of the run.
        batches: the run's.
        losses: the run's loss of each step.
        gradients: the run's gradients of step 1: the classifier's joined, every other by name.
        device: where to run.
    """
    steps = min(CHECKED_STEPS, arguments.steps)
    config, source = model_of(arguments)
    model = build_stage(config, source, 0, 1, None, device=device, dtype=torch.float32)
    settings = logit_settings(config)
    optimizer, learning_rate = AdamW.of(arguments, model.parameters()), LearningRate(arguments)
    expected_losses = []
    gradient_differences: dict[str, float] = {}
    for step in trange(steps, desc="checking in one process", unit="step"):
        expected_losses.append(_backward(model, batches[step].to(device), settings))
        if step == 0:
            expected = named_gradients(model)
            if expected.keys() != gradients.keys():
                raise RuntimeError(
                    f"the mesh has no gradient of {sorted(expected.keys() - gradients.keys())}"
                )
            gradient_differences = {
                name: _relative(gradients[name], gradient) for name, gradient in expected.items()
            }
        if arguments.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), arguments.clip_norm)
        learning_rate.set(optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
    comparison = Comparison(
        [abs(a - b) / abs(b) for a, b in zip(losses[:steps], expected_losses, strict=True)],
        gradient_differences,
    )
    _print(comparison, losses, expected_losses)
    return comparison


def join_gradients(pipeline: Pipeline, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Join all ranks' gradients on rank 0: the body's by name, the classifier's rows in order."""
    gathered = [gradients] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(gradients, gathered)
    if gathered is None:
        return None
    tied = pipeline.tied is not None
    rows: dict[str, list[Tensor]] = {CLASSIFIER: []}
    if tied or pipeline.spans:
        rows[EMBEDDING] = []
    joined: dict[str, Tensor] = {}
    for of_rank in gathered:  # ranks of one stage follow one another, vocab rank by vocab rank
        for name, gradient in of_rank.items():
            if name in rows:
                rows[name].append(gradient)
            else:
                joined[name] = gradient
    if tied:  # both ends have the same sum
        rows = {EMBEDDING: rows[EMBEDDING] or rows[CLASSIFIER]}
    return joined | {name: torch.cat(own) for name, own in rows.items() if own}


def _backward(model: Stage, batch: Batch, settings: LogitSettings) -> float:
    """Accumulate the gradients of one step, a sequence at a time; return the mean loss."""
    total = 0.0
    softcap = settings["softcap"]
    count = max(1, int((batch.labels[:, 1:] != IGNORED).sum()))
    for one in batch.chunk(len(batch.ids)):
        hidden = model.hidden_states(one.ids, one.position_ids)
        logits = F.linear(hidden[0, :-1], model.lm_head.weight)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / settings["temperature"]
        labels = one.labels[0, 1:]
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / count
        loss.backward()
        total += float(loss.detach())
    return total


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def _print(comparison: Comparison, losses: list[float], expected: list[float]) -> None:
    table = Table(title="the mesh against one unsharded process")
    for column in ("", "mesh", "one process", "relative difference", "allowed"):
        table.add_column(column, justify="left" if not column else "right")
    for step, difference in enumerate(comparison.losses):
        table.add_row(
            f"loss of step {step + 1}",
            f"{losses[step]:.6f}",
            f"{expected[step]:.6f}",
            f"{difference:.1e}",
            f"{LOSS_TOLERANCE:.0e}",
        )
    rows = CLASSIFIER if CLASSIFIER in comparison.gradients else EMBEDDING  # tied: one weight
    head = comparison.gradients[rows]
    body = {name: d for name, d in comparison.gradients.items() if name != rows}
    worst = max(body, key=lambda name: body[name])
    for name, difference in (
        ("gradient of the classifier, rows joined", head),
        (f"largest of {len(body)} body gradients: {worst}", body[worst]),
    ):
        table.add_row(name, "", "", f"{difference:.1e}", f"{GRADIENT_TOLERANCE:.0e}")
    Console(width=100).print(table)
