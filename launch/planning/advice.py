"""What would be better than the best mesh as it was asked for: sentences, none where nothing is."""

import contextlib
from dataclasses import replace

from launch.planning.estimate import Job
from launch.planning.hardware import Hardware
from launch.planning.meshes import (
    MOST_GPUS,
    MeshPlan,
    VocabOver,
    least_gpus,
    plan_mesh,
    plan_meshes,
)
from launch.planning.schedules import SCHEDULES
from launch.planning.table import ALIKE
from launch.planning.unpiped import Unpiped

LARGE, SMALL = 0.1, 0.05  # a bubble that is worth a word, and one that is not
MOST_TIMES = 64  # the microbatches that were asked for


def more_microbatches(job: Job, best: MeshPlan, hardware: Hardware, gpu_memory: float) -> str:
    """Say how many microbatches would make the best mesh's bubble small.

    They are doubled until it is, or until that helps no more.
    """
    if best.bubble <= LARGE:
        return ""
    mesh, count, found = best.mesh, job.microbatches, best
    for _ in range(MOST_TIMES.bit_length() - 1):
        more = replace(job, microbatches=2 * count)
        tried = plan_mesh(more, mesh, hardware, gpu_memory, best.vocab_over, simulated=False)
        if not tried.fits or tried.bubble > found.bubble - ALIKE:
            break
        count, found = 2 * count, tried
        if found.bubble <= SMALL:
            break
    more = replace(job, microbatches=count)
    found = plan_mesh(more, mesh, hardware, gpu_memory, best.vocab_over, simulated=True)
    if not found.fits or found.bubble > best.bubble - SMALL:
        return ""
    sequences = count * job.microbatch * mesh.data * mesh.vocab
    return (
        f"--microbatches {count}, a batch of {sequences:,} sequences, would bring the bubble from "
        f"{best.bubble:.0%} to {found.bubble:.0%}."
    )


def other_schedule(job: Job, best: MeshPlan, hardware: Hardware, gpu_memory: float) -> str:
    """Say which other schedule would be faster on the best mesh, of those that fit on it."""
    if best.mesh.pipeline == 1:
        return ""
    job = replace(job, microbatches=best.step.microbatches)

    def planned(schedule: str, *, simulated: bool) -> MeshPlan | None:
        own = replace(job, schedule=schedule)
        if best.vocab_over == "all-stages" and not SCHEDULES[schedule].held:
            return None
        with contextlib.suppress(ValueError):  # of the schedule, for these degrees
            one = plan_mesh(
                own, best.mesh, hardware, gpu_memory, best.vocab_over, simulated=simulated
            )
            # Layers cannot run again in both halves of a backward.
            if one.fits and not (one.recompute_layers and SCHEDULES[schedule].splits):
                return one
        return None

    expected = {
        schedule: one.tokens_per_second
        for schedule in SCHEDULES
        if schedule != job.schedule and (one := planned(schedule, simulated=False)) is not None
    }
    if not expected:
        return ""
    name = max(expected, key=lambda schedule: expected[schedule])
    if expected[name] < (1 + ALIKE) * best.tokens_per_second:
        return ""
    found = planned(name, simulated=True)
    if found is None or found.tokens_per_second < (1 + ALIKE) * best.tokens_per_second:
        return ""
    gain = found.tokens_per_second / best.tokens_per_second - 1
    return (
        f"--schedule {SCHEDULES[name].name} would be {gain:.1%} faster on that mesh, "
        f"{found.tokens_per_second:,.0f} tokens/s, with {max(found.rank_memory) / 1e9:.1f} GB on "
        f"the fullest rank."
    )


def rather_unpiped(best: MeshPlan, others: list[Unpiped]) -> str:
    """Say which of the ways without a pipeline is better than the best mesh."""
    fitting = [one for one in others if one.missing <= 0]
    one = min(fitting, key=lambda one: one.step_seconds, default=None)
    if one is None or not best.fits:
        return "" if one is None else f"{one.name} fits, without a pipeline."
    gain = one.tokens_per_second / best.tokens_per_second - 1
    if gain < ALIKE:
        return ""
    return f"{one.name}, without a pipeline, would be {gain:.1%} faster at the same batch."


def way_to_fit(
    job: Job,
    hardware: Hardware,
    gpu_memory: float,
    vocab_over: tuple[VocabOver, ...],
    batch: int | None,
    gpus: int,
) -> str:
    """Say what would fit where nothing does: shards of the body, or how many GPUs."""
    sentences = ["No mesh fits."]
    if not job.shard_body:
        sharded = replace(job, shard_body=True)
        plans = plan_meshes(sharded, gpus, hardware, gpu_memory, vocab_over, batch)
        if plans[0].fits:
            mesh = plans[0].mesh
            sentences.append(
                f"--shard-body would fit, on {mesh.data} x {mesh.pipeline} x {mesh.vocab}."
            )
    least = least_gpus(job, hardware, gpu_memory, vocab_over, batch)
    if least is None:
        sentences.append(
            f"{MOST_GPUS:,} GPUs with {gpu_memory / 1e9:.0f} GB each would not do: give a smaller "
            f"--microbatch or --sequence, or more memory to each."
        )
    else:
        sentences.append(f"{least} GPUs with {gpu_memory / 1e9:.0f} GB each are the least that do.")
    return " ".join(sentences)
