"""The order of a step in which all stages of a pipeline carry the vocabulary; no torch.

Every rank holds rows of the classifier and does its share of each microbatch's loss between its own
layers. With the last stage's forward F of microbatch m begins

    broadcast of its hidden states -> S(m) on every rank -> exchange of statistics, reduction of dE
                                                         -> B(m) of the last stage
                                                         -> T(m) on every rank, any time later

(the passes' names are those of arXiv 2411.05288; one barrier as in its Algorithm 2, or two, where
dE is made by T and reduced behind it). A schedule's own order of F and B stays what it is, but for
`more_forwards`: the last stage's B(m) waits for every rank's S(m), and has another forward to do
meanwhile. An evaluation has F, S and the exchange alone.

Where the ranks hold rows of the embedding too, each looks its own up for microbatch m before the
first stage's F(m), which receives their sum, and gets the gradient of them after its backward.

`order_of` runs the pipeline on paper: the rank that can begin first takes what is most urgent of
what is ready. What comes out is one total order of computations and messages, of which each rank's
list is the restriction. So no two ranks wait for one another, even where each message blocks until
all who take part have come: of the first message in the order that is not done, all of whose ranks
have done what stands before it, nobody is missing.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

# F forward; B backward, whole; I and W its halves, inputs' and weights'; S and T of the loss.
Pass = Literal["F", "B", "I", "W", "S", "T"]
# Activations to the next stage, gradients to the one before; and those of the vocabulary's group:
# hidden states of the last stage, statistics (and dE, if there is one barrier), dE (if two);
# embeddings to the first stage, and their gradient to every rank.
Message = Literal[
    "activations", "gradients", "broadcast", "exchange", "reduction", "lookup", "embedding_grad"
]
# How many forwards more are tried.
_MORE_FORWARDS = 3
# How many T may wait on a rank before they come first: each keeps its hidden states.
_WAITING = 2
# How many microbatches an embedding is looked up ahead, so that the first stage does not wait.
_LOOKED_UP_AHEAD = 2


class Task(NamedTuple):
    """A pass of a stage's layers: what a schedule lists for a rank."""

    kind: Pass
    stage: int
    microbatch: int


class Event(NamedTuple):
    """Something that some ranks do, all of them at this place of the order.

    Attributes:
        kind: a pass, by one rank; or a message, from the first rank to the second or among all.
        stage: whose it is; a message's sender's; the last one for what is the vocabulary's.
        microbatch: counted from 0.
        ranks: who takes part.
        start, end: in the units of the costs.
    """

    kind: Pass | Message
    stage: int
    microbatch: int
    ranks: tuple[int, ...]
    start: float
    end: float


@dataclass(frozen=True)
class Costs:
    """How long everything takes, in any one unit.

    Attributes:
        forward, backward_input, backward_weight: of a stage's layers, a microbatch.
        statistics, gradients: S and T of each rank's rows, a microbatch. With one barrier dE is
            made in S, with two in T.
        message: from one rank to the next.
        broadcast, exchange: of the vocabulary's group; a reduction takes as long as an exchange.
    """

    forward: Callable[[int], float]
    backward_input: Callable[[int], float]
    backward_weight: Callable[[int], float]
    statistics: Sequence[float]
    gradients: Sequence[float]
    message: float = 0.0
    broadcast: float = 0.0
    exchange: float = 0.0

    def of(self, kind: Pass, stage: int, rank: int) -> float:
        """Return how long a pass takes."""
        if kind == "F":
            return self.forward(stage)
        if kind == "B":
            return self.backward_input(stage) + self.backward_weight(stage)
        if kind in ("I", "W"):
            return self.backward_input(stage) if kind == "I" else self.backward_weight(stage)
        return self.statistics[rank] if kind == "S" else self.gradients[rank]


class Order(NamedTuple):
    """One total order of a step.

    Attributes:
        events: each rank does those that name it, in this order.
        finish: when the last of them ends.
        in_flight: of each stage, the most microbatches between F and the end of their backward.
        hidden_held: the most microbatches between their broadcast and a rank's T of them.
        busy: how long each rank computes.
    """

    events: tuple[Event, ...]
    finish: float
    in_flight: dict[int, int]
    hidden_held: int
    busy: tuple[float, ...]

    @property
    def passes(self) -> list[Event]:
        """What is computed, without the messages."""
        return [event for event in self.events if len(event.ranks) == 1]


def tasks_listed(actions: Iterable[Any]) -> list[Task]:
    """Return what a schedule of torch's lists for a rank, where None waits; some pair F with B."""
    return [
        Task(one.computation_type.value, one.stage_index, one.microbatch_index)
        for action in filter(None, actions)
        for one in action.sub_actions or (action,)
    ]


def one_forward_one_backward(ranks: int, microbatches: int) -> list[list[Task]]:
    """Return 1F1B's own order of each rank, which is a stage: P - r forwards before a backward."""
    in_turn = [
        [Task(kind, rank, number) for number in range(microbatches) for kind in ("F", "B")]
        for rank in range(ranks)
    ]
    return [more_forwards(own, ranks - 1 - rank) for rank, own in enumerate(in_turn)]


def more_forwards(order: Sequence[Task], count: int) -> list[Task]:
    """Move a rank's forwards to the front by ``count`` places among its backwards."""
    forwards = (task for task in order if task.kind == "F")
    moved = list(islice(forwards, count))
    for task in order:
        moved += islice(forwards, 1) if task.kind == "F" else [task]
    return moved


def forwards_alone(orders: Sequence[Sequence[Task]]) -> list[list[Task]]:
    """Return what is left of a schedule's order in an evaluation."""
    return [[task for task in own if task.kind == "F"] for own in orders]


def best_order(
    orders: Sequence[Sequence[Task]],
    costs: Costs,
    *,
    barriers: int = 1,
    embedding: bool = False,
) -> Order:
    """Return the order that ends first, with the fewest forwards more, at least one.

    Args:
        orders, costs, barriers, embedding: as `order_of` has them.

    Raises:
        ValueError: the schedule cannot span: with up to three forwards more no rank comes to the
            end of its list.
    """
    found: Order | None = None
    for count in range(1, _MORE_FORWARDS + 1):
        moved = [more_forwards(own, count) for own in orders]
        try:
            order = order_of(moved, costs, barriers=barriers, embedding=embedding)
        except ValueError:
            continue
        if found is not None and order.finish > found.finish * (1 - 1e-3):
            break  # it gains nothing, and holds more
        found = order
    if found is None:
        raise ValueError(
            f"the schedule cannot carry the vocabulary on all stages: with up to "
            f"{_MORE_FORWARDS} forwards more a rank still waits for itself; use 1F1B, "
            f"Interleaved1F1B or ZBVZeroBubble"
        )
    return found


def order_of(
    orders: Sequence[Sequence[Task]],
    costs: Costs,
    *,
    barriers: int = 1,
    embedding: bool = False,
    vocabulary: bool = True,
) -> Order:
    """Place the vocabulary's passes and all messages into a schedule's own order of each rank.

    Args:
        orders: of each rank, the passes of its layers; no rank's is changed.
        costs: how long everything takes.
        barriers: 1 where S makes dE, 2 where T does.
        embedding: whether all ranks hold rows of the embedding.
        vocabulary: whether they hold the classifier's; False is the schedule as torch runs it, its
            last stage's loss a part of its passes.

    Raises:
        ValueError: the ranks' lists wait for one another, as those do that have the last stage's B
            right after its F of the same microbatch.
    """
    return _Step(orders, costs, barriers, embedding, vocabulary).run()


@dataclass
class _Step:
    """A step run on paper; its fields are the arguments of `order_of`."""

    orders: Sequence[Sequence[Task]]
    costs: Costs
    barriers: int
    embedding: bool
    vocabulary: bool

    def __post_init__(self) -> None:
        every = [task for own in self.orders for task in own]
        self._trains = any(task.kind != "F" for task in every)
        self._ranks = range(len(self.orders))
        self._left = [list(reversed(own)) for own in self.orders]  # the next one is the last
        self._rank_of = {task.stage: rank for rank in self._ranks for task in self.orders[rank]}
        self._last = max(self._rank_of)
        self._microbatches = 1 + max(task.microbatch for task in every)
        self._free = [0.0 for _ in self._ranks]
        self._busy = [0.0 for _ in self._ranks]
        self._done: dict[tuple[Pass, int, int], float] = {}  # kind, stage, microbatch
        # When the last rank so far ended S, or T, of a microbatch that not all have done.
        self._ends: dict[tuple[Pass, int], float] = {}
        # When the statistics of a microbatch are joined, and when its dE is summed.
        self._joined: dict[int, float] = {}
        self._summed = self._joined if self.barriers == 1 else {}
        self._next: dict[Pass, list[int]] = {kind: [0 for _ in self._ranks] for kind in ("S", "T")}
        self._looked_up = 0
        self._events: list[Event] = []

    def run(self) -> Order:
        """Go on until nothing can be begun, and see that nothing is left."""
        choices = [self._most_urgent(rank) for rank in self._ranks]
        while True:
            begins, rank, task = min(choices)
            if task is None:
                break
            self._do(begins, rank, task)
            # What another rank may begin changes by a neighbour's pass, or by one of the loss's.
            of_all = task.kind in ("S", "T") or (self.vocabulary and task[:2] == ("F", self._last))
            near = (self._rank_of.get(task.stage + step, rank) for step in (-1, 1))
            for other in self._ranks if of_all else {rank, *near}:
                choices[other] = self._most_urgent(other)
        done = min(self._next["T" if self._trains else "S"])
        if any(self._left) or (self.vocabulary and done < self._microbatches):
            stuck = {rank: own[-1] for rank, own in enumerate(self._left) if own}
            raise ValueError(f"the ranks wait for one another at {stuck}: give a forward more")
        # A pass that begins when a message ends was begun after it was sent: the sort is stable.
        events = sorted(self._events, key=lambda event: event.start)
        held = _most_held(events, ("broadcast",), ("T",), lambda event: event.ranks)
        return Order(
            tuple(events),
            max(self._free),
            in_flight(events),
            max(held.values()),
            tuple(self._busy),
        )

    def _most_urgent(self, rank: int) -> tuple[float, int, Task | None]:
        """Return (when it begins, the rank, what it does next): nothing where nothing is ready."""
        ready: list[tuple[float, int, Task]] = []
        s, t = self._next["S"][rank], self._next["T"][rank]
        hidden = self._done.get(("F", self._last, s)) if self.vocabulary else None
        if hidden is not None:
            ready.append((hidden + self.costs.broadcast, 0, Task("S", self._last, s)))
        joined = self._joined.get(t) if t < s and self._trains else None
        if joined is not None:
            urgency = 1 if s - t > _WAITING else 3
            if self.barriers == 2:
                urgency = -1  # the last stage's backward waits for it
            ready.append((joined, urgency, Task("T", self._last, t)))
        if self._left[rank]:
            task = self._left[rank][-1]
            when = self._ready(task)
            if when is not None:
                ready.append((when, 2, task))
        if not ready:
            return math.inf, rank, None
        begins = max(self._free[rank], min(when for when, _, _ in ready))
        _, task = min((urgency, task) for when, urgency, task in ready if when <= begins)
        return begins, rank, task

    def _ready(self, task: Task) -> float | None:
        """Return when what a pass needs is there, or None where it has not been begun."""
        kind, stage, microbatch = task
        if kind == "W":
            return 0.0  # of its own rank, and earlier in its list
        if kind == "F":
            return 0.0 if stage == 0 else self._arrival(("F", stage - 1, microbatch), stage)
        own = self._done.get(("F", stage, microbatch))
        if stage == self._last:
            return own if own is None or not self.vocabulary else self._summed.get(microbatch)
        for half in ("B", "I"):
            gradient = self._arrival((half, stage + 1, microbatch), stage)
            if gradient is not None:
                return None if own is None else max(own, gradient)
        return None

    def _arrival(self, sent: tuple[Pass, int, int], receiver: int) -> float | None:
        done = self._done.get(sent)
        if done is None or self._rank_of[sent[1]] == self._rank_of[receiver]:
            return done
        return done + self.costs.message

    def _do(self, begins: float, rank: int, task: Task) -> None:
        kind, stage, microbatch = task
        end = begins + self.costs.of(kind, stage, rank)
        self._free[rank] = end
        self._busy[rank] += end - begins
        if self.embedding and kind == "F" and stage == 0:
            self._look_up(microbatch, begins)
        self._events.append(Event(kind, stage, microbatch, (rank,), begins, end))
        if kind in ("S", "T"):
            self._end_of_all(kind, rank, microbatch, end)
            return
        self._left[rank].pop()
        self._done[kind, stage, microbatch] = end
        if kind == "F" and stage == self._last and self.vocabulary:
            self._tell_all("broadcast", microbatch, end, self.costs.broadcast)
        elif kind == "F" and stage < self._last:
            self._send("activations", stage, stage + 1, microbatch, end)
        elif kind in ("B", "I") and stage > 0:
            self._send("gradients", stage, stage - 1, microbatch, end)
        if self.embedding and kind in ("B", "W") and stage == 0:
            self._tell_all("embedding_grad", microbatch, end, self.costs.broadcast)

    def _end_of_all(self, kind: Pass, rank: int, microbatch: int, end: float) -> None:
        """Note that a rank has done S or T; with the last rank's comes a message among all."""
        self._next[kind][rank] += 1
        start = self._ends[kind, microbatch] = max(self._ends.get((kind, microbatch), 0.0), end)
        if min(self._next[kind]) <= microbatch:  # some rank has not
            return
        if kind == "S":
            self._joined[microbatch] = start + self.costs.exchange
            self._tell_all("exchange", microbatch, start, self.costs.exchange)
        elif self.barriers == 2:
            self._summed[microbatch] = start + self.costs.exchange
            self._tell_all("reduction", microbatch, start, self.costs.exchange)

    def _look_up(self, microbatch: int, now: float) -> None:
        """Let all ranks look up embeddings that the first stage needs, some microbatches ahead."""
        until = min(microbatch + 1 + _LOOKED_UP_AHEAD, self._microbatches)
        for number in range(self._looked_up, until):
            self._tell_all("lookup", number, now, self.costs.exchange)
        self._looked_up = max(self._looked_up, until)

    def _tell_all(self, kind: Message, microbatch: int, start: float, takes: float) -> None:
        everyone = tuple(self._ranks)
        self._events.append(Event(kind, self._last, microbatch, everyone, start, start + takes))

    def _send(
        self, kind: Message, sender: int, receiver: int, microbatch: int, start: float
    ) -> None:
        pair = (self._rank_of[sender], self._rank_of[receiver])
        if pair[0] != pair[1]:
            end = start + self.costs.message
            self._events.append(Event(kind, sender, microbatch, pair, start, end))


def in_flight(passes: Iterable[Event | Task]) -> dict[int, int]:
    """Count for each stage the most microbatches between F and the end of their backward."""
    return _most_held(passes, ("F",), ("B", "W"), lambda done: (done.stage,))


def _most_held(
    done: Iterable[Event | Task],
    begins: tuple[str, ...],
    ends: tuple[str, ...],
    who: Callable[[Any], tuple[int, ...]],
) -> dict[int, int]:
    """Count for each of ``who`` the most microbatches that are between two kinds of passes."""
    now: Counter[int] = Counter()
    most: Counter[int] = Counter()
    for each in done:
        step = (each.kind in begins) - (each.kind in ends)
        for one in who(each):
            now[one] += step
            most[one] = max(most[one], now[one])
    return dict(sorted(most.items()))
