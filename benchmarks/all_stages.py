"""The contestant of the last-stage study whose every stage carries the vocabulary.

All P x V ranks have equally many rows, and the columns sequences of their own. A rank's layers and
its S and T are measured on this card, first stage and last; a step is simulated from their times,
in the order that is run.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Row
from benchmarks.measure import interleaved
from benchmarks.row_passes import RowPasses
from benchmarks.stages import Stage, StageMeasurement, measure_with_passes, release
from launch.planning.balance import layer_counts
from launch.planning.hardware import Hardware
from launch.planning.orders import tasks_of
from vocab_parallel.pipeline.spanning.order import Costs, Order, best_order

NAME = "(e) ours, all stages"


def measure_all_stages(
    case: Case,
    layer: float,
    *,
    sequence: int,
    microbatches: int,
    rounds: int,
    hardware: Hardware,
    device: torch.device,
) -> Row:
    """Measure first and last stage, and simulate the step.

    Args:
        case: the model and the mesh.
        layer: milliseconds of one, for the order that says what is in flight.
        sequence, microbatches: of a column.
        rounds: timed ones.
        hardware: whose links are taken.
        device: this one.
    """
    rows = -(-case.config["vocab_size"] // (case.pipeline * case.vocab))
    counts = layer_counts(case.config["num_hidden_layers"], case.pipeline, 0.0)
    passes = _passes(case, rows, sequence, device)
    s, t = _seconds_of(case, passes, sequence, rounds, device)
    link = case.config["hidden_size"] * sequence / hardware.link_bytes  # a byte for each number

    def order_of(milliseconds: list[float]) -> Order:
        thirds = [one / 3e3 for one in milliseconds]
        costs = Costs(
            forward=lambda stage: thirds[stage],
            backward_input=lambda stage: thirds[stage],
            backward_weight=lambda stage: thirds[stage],
            statistics=[s / 1e3] * case.pipeline,
            gradients=[t / 1e3] * case.pipeline,
            message=2 * link,
            broadcast=2 * link * case.vocab,
            exchange=4 * link * case.vocab,
        )
        return best_order(tasks_of("1f1b", case.pipeline, microbatches), costs)

    order = order_of([count * layer for count in counts])
    ends: list[StageMeasurement] = []
    for stage_index in (0, case.pipeline - 1):
        options: dict[str, Any] = {"again": case.again}
        if not case.config["tie_word_embeddings"]:
            options["embedding_rows"] = rows
        stage = Stage(case.config, counts[stage_index], sequence, device, **options)
        found = measure_with_passes(
            stage,
            passes,
            in_flight=order.in_flight[stage_index],
            held=order.hidden_held,
            columns=case.vocab,
            device=device,
            rounds=rounds,
        )
        ends.append(found)
        del stage
        release(device)
    del passes
    release(device)
    first, last = (one.milliseconds - s - t for one in ends)
    layers = [count * first / counts[0] for count in counts[:-1]] + [last]
    return Row(
        layers=counts,
        loss_milliseconds=s + t,
        last_milliseconds=ends[-1].milliseconds,
        first_milliseconds=ends[0].milliseconds,
        link_milliseconds=1e3 * 6 * link * case.vocab,
        last_peak=ends[-1].peak,
        first_peak=ends[0].peak,
        step_seconds=order_of(layers).finish,
    )


def _passes(case: Case, rows: int, sequence: int, device: torch.device) -> RowPasses:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = case.config["hidden_size"]
    softcap = case.config.get("final_logit_softcapping")
    return RowPasses(case.vocab * sequence, hidden, rows, dtype, device, softcap=softcap)


def _seconds_of(
    case: Case, passes: RowPasses, sequence: int, rounds: int, device: torch.device
) -> tuple[float, float]:
    """Return the milliseconds of S and of T."""
    shape = (1, case.vocab * sequence, case.config["hidden_size"])
    hidden: Tensor = torch.randn(shape, device=device).to(passes.weight.dtype).requires_grad_()
    only_s, both = passes.calls(hidden)
    found = interleaved({"S": only_s, "S and T": both}, device=device, rounds=rounds)
    s = found["S"].milliseconds
    return s, max(found["S and T"].milliseconds - s, 0.0)
