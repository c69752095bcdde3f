"""What would be better than the best mesh as it was asked for: sentences, none where nothing is."""

import contextlib
from dataclasses import replace

from launch.planning.estimate import Job
from launch.planning.hardware import Hardware
from launch.planning.meshes import (
    MOST_GPUS,
    MeshPlan,
    MeshPlanner,
    VocabOver,
    least_gpus,
    plan_meshes,
)
from launch.planning.schedules import SCHEDULES
from launch.planning.table import ALIKE
from launch.planning.unpiped import Unpiped

LARGE, SMALL = 0.1, 0.05  # a bubble that is worth a word, and one that is not
MOST_TIMES = 64  # the microbatches that were asked for


def more_microbatches(job: Job, best: MeshPlan, hardware: Hardware) -> str:
    """Say how many microbatches would make the best mesh's bubble small.

    They are doubled until it is, or until that helps no more.
    """
    if best.bubble <= LARGE:
        return ""

    def planned(microbatches: int, *, simulated: bool) -> MeshPlan:
        more = replace(job, microbatches=microbatches)
        return MeshPlanner(hardware).plan(more, best.mesh, best.vocab_over, simulated=simulated)

    found = best
    while found.bubble > SMALL and found.microbatches < MOST_TIMES * job.microbatches:
        tried = planned(2 * found.microbatches, simulated=False)
        if not tried.fits or tried.bubble > found.bubble - ALIKE:
            break
        found = tried
    found = planned(found.microbatches, simulated=True)
    if not found.fits or found.bubble > best.bubble - SMALL:
        return ""
    sequences = found.microbatches * job.microbatch * best.mesh.columns
    return (
        f"--microbatches {found.microbatches}, a batch of {sequences:,} sequences, would bring "
        f"the bubble from {best.bubble:.0%} to {found.bubble:.0%}."
    )


def other_schedule(job: Job, best: MeshPlan, hardware: Hardware) -> str:
    """Say which other schedule would be faster on the best mesh, of those that fit on it."""
    if best.mesh.pipeline == 1:
        return ""

    def speed(name: str, *, simulated: bool) -> tuple[float, float]:
        """Return tokens a second, none where it does not run, and the fullest rank's bytes."""
        schedule = SCHEDULES[name]
        own = replace(job, microbatches=best.microbatches, schedule=name)
        planner = MeshPlanner(hardware)
        if best.vocab_over == "last-stage" or schedule.held:
            with contextlib.suppress(ValueError):  # of the schedule, for these degrees
                one = planner.plan(own, best.mesh, best.vocab_over, simulated=simulated)
                # Layers cannot run again in both halves of a backward.
                if one.fits and not (one.recompute_layers and schedule.splits):
                    return one.tokens_per_second, max(one.rank_memory)
        return 0.0, 0.0

    others = [name for name in SCHEDULES if name != job.schedule]
    name = max(others, key=lambda name: speed(name, simulated=False))
    least = (1 + ALIKE) * best.tokens_per_second
    if speed(name, simulated=False)[0] < least:
        return ""
    found, memory = speed(name, simulated=True)
    if found < least:
        return ""
    return (
        f"--schedule {SCHEDULES[name].name} would be {found / best.tokens_per_second - 1:.1%} "
        f"faster on that mesh, {found:,.0f} tokens/s, with {memory / 1e9:.1f} GB on the fullest "
        f"rank."
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
    vocab_over: tuple[VocabOver, ...],
    batch: int | None,
    gpus: int,
) -> str:
    """Say what would fit where nothing does: shards of the body, or how many GPUs."""
    sentences = ["No mesh fits."]
    if not job.shard_body:
        sharded = replace(job, shard_body=True)
        plans = plan_meshes(sharded, gpus, hardware, vocab_over, batch)
        if plans[0].fits:
            sentences.append(f"--shard-body would fit, on {plans[0].mesh}.")
    least, each = (
        least_gpus(job, hardware, vocab_over, batch),
        f"{hardware.memory / 1e9:.0f} GB each",
    )
    if least is None:
        sentences.append(
            f"{MOST_GPUS:,} GPUs with {each} would not do: give a smaller --microbatch or "
            f"--sequence, or more memory to each."
        )
    else:
        sentences.append(f"{least} GPUs with {each} are the least that do.")
    return " ".join(sentences)
