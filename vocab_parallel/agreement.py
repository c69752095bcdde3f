"""One small exchange before the work, so that a mistake ends every rank of a group or none.

A ValueError on one rank alone would leave its peers waiting in a collective until the group's
timeout. So each rank says whether its own arguments are right, and what must be equal or must
fit together over the group; all of them then come to the same verdict.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from operator import attrgetter
from typing import Any

from vocab_parallel.collectives import VocabGroup

_BY_START = attrgetter("start", "stop")
_SIZE, _TARGETS = attrgetter("vocab_size"), attrgetter("targets")


@dataclass(frozen=True)
class RankSummary:
    """What one rank says of the vocabulary.

    Attributes:
        start, stop: the rows that it holds.
        vocab_size: how many of all rows are tokens; -1 means every row.
        lowest_target, highest_target: of its targets; (0, -1) where it has none.
        targets: a number that is equal where targets are; 0 where each rank has its own.
    """

    start: int = 0
    stop: int = 0
    vocab_size: int = -1
    lowest_target: int = 0
    highest_target: int = -1
    targets: int = 0


def agree(
    problem: ValueError | None,
    claim: RankSummary,
    settings: Mapping[str, Any],
    group: VocabGroup,
    *,
    digest: int | None = None,
) -> None:
    """Raise the same ValueError on every rank of the group, or on none; all must call.

    Communicates 8 integers a rank, and where something is wrong a few hundred bytes more to say
    what; it waits for the result.

    Args:
        problem: what is wrong on this rank alone, or None.
        claim: this rank's rows and targets.
        settings: what must be equal on every rank, by name.
        group: the vocab group.
        digest: of the settings, where the caller has it; see `digest_of`.

    Raises:
        ValueError: a rank has a problem; settings differ; the ranges overlap, leave a gap or
            differ in vocabulary; a target is outside of the vocabulary; targets differ that must
            be the same.
    """
    if group.degree == 1:
        if problem is not None:
            raise problem
        _check_claims([claim])
        return
    if digest is None:
        digest = digest_of(settings)
    told = group.exchange_integers([problem is not None, digest, *astuple(claim)])
    if told[:, 0].any():
        raise _worded_problem(problem, group)
    if (told[:, 1] != told[0, 1]).any():
        raise _worded_difference(settings, group)
    _check_claims([RankSummary(*claimed) for claimed in told[:, 2:].tolist()])


def _worded_problem(problem: ValueError | None, group: VocabGroup) -> ValueError:
    texts = group.exchange_objects(None if problem is None else str(problem))
    found = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    distinct = {text for _, text in found}
    if len(found) == group.degree and len(distinct) == 1:
        return ValueError(found[0][1])
    return ValueError(
        "; ".join(f"on rank {rank} of the vocab group: {text}" for rank, text in found)
    )


def _worded_difference(settings: Mapping[str, Any], group: VocabGroup) -> ValueError:
    every = group.exchange_objects(dict(settings))
    names = dict.fromkeys(name for each in every for name in each)
    # By their texts, as the digests are: 3 and 3.0 are not one.
    differing = [name for name in names if len({repr(e.get(name)) for e in every}) > 1]
    values = "; ".join(f"{name}: {[e.get(name) for e in every]}" for name in differing)
    return ValueError(
        f"the ranks of the vocab group must agree, but rank by rank they have {values}; "
        "pass the same on each"
    )


def _check_claims(claims: list[RankSummary]) -> None:
    num_rows = _check_partition(claims)
    vocab_size = claims[0].vocab_size if claims[0].vocab_size >= 0 else num_rows
    for rank, claim in enumerate(claims):
        if claim.lowest_target > claim.highest_target:
            continue  # no target at all
        for target in (claim.lowest_target, claim.highest_target):
            if not 0 <= target < vocab_size:
                raise ValueError(
                    f"targets must lie in [0, {vocab_size}) or be ignore_index, got {target} on "
                    f"rank {rank} of the vocab group: they are ids of the whole vocabulary, not "
                    f"of one rank's rows"
                )
    checksums = list(map(_TARGETS, claims))
    if min(checksums) != max(checksums):
        raise ValueError(
            f"the ranks of the vocab group have different targets (their checksums are "
            f'{checksums}), which only hidden_layout="sharded" has: give every rank the same'
        )


def _check_partition(claims: list[RankSummary]) -> int:
    """Check that the ranges partition one vocabulary; return the number of rows."""
    sizes, covered = list(map(_SIZE, claims)), 0
    if min(sizes) != max(sizes):
        raise ValueError(
            f"the ranks of the vocab group have different vocabularies: vocab_size is {sizes} "
            f"(-1: every row); give every rank the same"
        )
    fault = ""
    for claim in sorted(claims, key=_BY_START):
        if claim.start == claim.stop:
            continue
        if claim.start != covered:
            kind = "leave a gap" if claim.start > covered else "overlap"
            fault = f"{kind} at row {min(claim.start, covered)}"
            break
        covered = claim.stop
    if not fault and covered < max(sizes[0], 1):
        fault = f"end at {covered}, before the vocabulary of {max(sizes[0], 1)}"
    if fault:
        ranges = ", ".join(f"[{claim.start}, {claim.stop})" for claim in claims)
        raise ValueError(
            f"the rows of the vocab group {fault}: {ranges}; VocabParallelOptions.from_vocab gives "
            f"a partition"
        )
    return covered


def digest_of(settings: Mapping[str, Any]) -> int:
    """Return 62 bits of a hash that is the same in every process."""
    text = repr(sorted(settings.items()))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
