"""One rank's part of a pipeline stage, as it runs in training: layers, and the loss after them."""

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants import Contestant, Operands
from benchmarks.measure import peak_of
from benchmarks.row_passes import RowPasses
from launch.planning.layers import DecoderLayers
from launch.timing import busy_work, time_of


@dataclass(frozen=True)
class StageMeasurement:
    """Milliseconds of one microbatch, forward and backward, and the most bytes that were held.

    The bytes are all of a rank's: weights, gradients, optimizer state, activations and the loss.
    """

    milliseconds: float
    peak: int


class Stage:
    """Decoder layers with gradients and the state of AdamW, and where asked for an embedding.

    Args:
        config: of the model, as transformers has it.
        layers: how many.
        sequence: N, tokens of a microbatch, one sequence.
        degree: over how many tensor-parallel ranks heads and the gated product are cut; this is
            one of them, without their all-reduces.
        embedding_rows: of the embedding that this rank holds; 0 off the first stage.
        again: whether a layer keeps its input alone and runs again in backward.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        layers: int,
        sequence: int,
        device: torch.device,
        *,
        degree: int = 1,
        embedding_rows: int = 0,
        again: bool = False,
    ) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.layers = DecoderLayers(_part_of(config, degree), layers, sequence, dtype, device)
        model = self.layers.model
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.state = [_state_of(parameter) for parameter in model.parameters()]
        if embedding_rows:
            rows = torch.zeros(embedding_rows, config["hidden_size"], device=device, dtype=dtype)
            self.state.append([rows, *_state_of(rows)])

    def forward(self) -> Tensor:
        """Run the layers; returns hidden states [N, D]."""
        return self.layers()[0]


def _part_of(config: Mapping[str, Any], degree: int) -> dict[str, Any]:
    """Return the configuration of what one of so many tensor-parallel ranks computes."""
    part = dict(config)
    part["head_dim"] = part.get("head_dim") or part["hidden_size"] // part["num_attention_heads"]
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        part[name] = max(1, part[name] // degree)
    return part


def _state_of(parameter: Tensor) -> list[Tensor]:
    """Allocate a parameter's gradient and both moments."""
    if parameter.requires_grad:
        parameter.grad = torch.zeros_like(parameter)
        return [torch.zeros_like(parameter) for _ in range(2)]
    return [torch.zeros_like(parameter) for _ in range(3)]


def measure_layers(
    stage: Stage, in_flight: int, device: torch.device, rounds: int
) -> StageMeasurement:
    """Measure a stage without the loss, and its peak with so many microbatches in flight."""

    def microbatch() -> None:
        hidden = stage.forward()
        hidden.backward(hidden.detach())

    def all_in_flight() -> None:
        waiting = [stage.forward() for _ in range(in_flight)]
        while waiting:
            hidden = waiting.pop(0)
            hidden.backward(hidden.detach())

    return _measure(microbatch, all_in_flight, device, rounds)


def measure_with_loss(
    stage: Stage, operands: Operands, loss: Contestant, device: torch.device, rounds: int
) -> StageMeasurement:
    """Measure the last stage under 1F1B: one microbatch at a time, the rows' gradient added up.

    The operands's hidden states are those of all columns in a gathering layout; this stage's are
    the first of them.
    """
    state = _state_of(operands.rows)
    rows_grad = operands.rows.grad
    assert rows_grad is not None

    def microbatch() -> None:
        hidden = stage.forward()
        own = hidden.shape[0]
        with torch.no_grad():
            operands.hidden[:own].copy_(hidden)
        hidden_grad, added = loss()
        rows_grad.add_(added)
        del added
        hidden.backward(hidden_grad[:own])

    found = _measure(microbatch, microbatch, device, rounds)
    operands.rows.grad = None
    del state
    return found


def measure_with_passes(
    stage: Stage,
    passes: RowPasses,
    *,
    in_flight: int,
    held: int,
    columns: int,
    device: torch.device,
    rounds: int,
) -> StageMeasurement:
    """Measure a stage that has its share of the loss, where all stages carry the vocabulary.

    Args:
        stage: its layers.
        passes: S and T of its rows.
        in_flight: microbatches of the stage at the worst moment.
        held: those of the loss then, between S and T, with their hidden states and shares of dE.
        columns: V, whose tokens the loss covers; this stage's are the first.
        device: this one.
        rounds: timed ones.
    """
    moments = [torch.zeros_like(passes.weight) for _ in range(2)]

    def of_all_columns(hidden: Tensor) -> Tensor:
        gathered = hidden.new_zeros((1, columns * hidden.shape[0], hidden.shape[1]))
        gathered[0, : hidden.shape[0]].copy_(hidden.detach())
        return gathered.requires_grad_()

    def microbatch() -> None:
        hidden = stage.forward()
        hidden_grad = passes.statistics(0, of_all_columns(hidden))[0, : hidden.shape[0]]
        passes.gradients(0)
        passes.finish()
        hidden.backward(hidden_grad.to(hidden.dtype))

    def all_in_flight() -> None:
        waiting = [stage.forward() for _ in range(in_flight)]
        shares = [passes.statistics(number, of_all_columns(waiting[-1])) for number in range(held)]
        while waiting:
            hidden = waiting.pop(0)
            hidden.backward(hidden.detach())
            while shares:  # T comes after the first of the backwards
                passes.gradients(held - len(shares))
                shares.pop(0)
        passes.finish()

    found = _measure(microbatch, all_in_flight, device, rounds)
    del moments
    return found


def _measure(
    timed: Callable[[], None], held: Callable[[], None], device: torch.device, rounds: int
) -> StageMeasurement:
    peak = peak_of(held, device, above=False)
    busy = busy_work(device)
    times = [time_of(timed, device, busy) for _ in range(1 + rounds)][1:]
    return StageMeasurement(statistics.median(times), peak)


def release(device: torch.device) -> None:
    """Give back what dead stages held, so that the next one's peak is its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
