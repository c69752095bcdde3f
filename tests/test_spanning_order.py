"""The order of a step in which all stages carry the vocabulary: whole, safe, and near the ideal."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
from torch import nn

from vocab_parallel.pipeline.spanning.order import (
    Costs,
    Event,
    Order,
    Task,
    best_order,
    forwards_alone,
    more_forwards,
    one_forward_one_backward,
    order_of,
)
from vocab_parallel.pipeline.spanning.schedule import tasks_of


def even(ranks: int, stages: int, layers: float, loss: float) -> Costs:
    """As much of the layers on every stage, of the loss on every rank: two of its products in S."""
    each = layers * ranks / stages
    return Costs(
        forward=lambda stage: each,
        backward_input=lambda stage: each,
        backward_weight=lambda stage: each,
        statistics=[2 / 3 * loss / ranks] * ranks,
        gradients=[loss / 3 / ranks] * ranks,
    )


def order_of_torch(name: str, ranks: int, microbatches: int) -> list[list[Task]]:
    """Return what a schedule of torch's lists for each rank."""
    num_stages = 2 * ranks
    v_shaped = name in ("ZBVZeroBubble", "DualPipeV")
    stages = [
        SimpleNamespace(
            stage_index=index, num_stages=num_stages, group_rank=0, group_size=ranks,
            is_first=index == 0, is_last=index == num_stages - 1, has_backward=True,
            submod=nn.Identity(), stage_index_to_group_rank={},
        )
        for index in (0, num_stages - 1 if v_shaped else ranks)
    ]  # fmt: skip
    return tasks_of(stages, name, microbatches)


def of_rank(order: Order, rank: int) -> list[Event]:
    return [event for event in order.events if rank in event.ranks]


def comes_to_an_end(order: Order, ranks: int) -> bool:
    """Run each rank's list with every message blocking until all who take part have come."""
    left = [list(reversed(of_rank(order, rank))) for rank in range(ranks)]
    while any(left):
        moved = False
        waiting: dict[Event, int] = Counter()
        for own in left:
            while own and len(own[-1].ranks) == 1:
                own.pop()
                moved = True
            if own:
                waiting[own[-1]] += 1
        for event, count in waiting.items():
            if count == len(event.ranks):
                for rank in event.ranks:
                    left[rank].pop()
                moved = True
        if not moved:
            return False
    return True


def check_whole(
    order: Order,
    orders: list[list[Task]],
    microbatches: int,
    barriers: int = 1,
    embedding: bool = False,
) -> None:
    """Each rank does what the schedule lists, each S and T once, in the order of microbatches.

    And each message comes after what it carries, and before what needs it.
    """
    trains = any(task.kind != "F" for own in orders for task in own)
    ranks = len(orders)
    for rank, own in enumerate(orders):
        events = [event for event in of_rank(order, rank) if len(event.ranks) == 1]
        listed = [Task(*event[:3]) for event in events if event.kind not in ("S", "T")]  # type: ignore[arg-type]
        assert listed == list(own)
        for kind in ("S", "T") if trains else ("S",):
            assert [e.microbatch for e in events if e.kind == kind] == list(range(microbatches))
    messages = ["broadcast", "exchange"]
    messages += ["reduction"] if barriers == 2 and trains else []
    messages += ["lookup"] if embedding else []
    for kind in messages:
        told = [event for event in order.events if event.kind == kind]
        assert [event.microbatch for event in told] == list(range(microbatches))
        assert all(event.ranks == tuple(range(ranks)) for event in told)
    told = [event for event in order.events if event.kind == "embedding_grad"]
    wanted = range(microbatches if embedding and trains else 0)
    assert sorted(event.microbatch for event in told) == list(wanted)
    check_dependencies(order, barriers)
    assert comes_to_an_end(order, ranks)


def check_dependencies(order: Order, barriers: int) -> None:
    """In the total order everything stands behind what it needs."""
    last = max(event.stage for event in order.events)
    places: dict[tuple[str, int, int], list[int]] = {}
    for place, event in enumerate(order.events):
        places.setdefault((event.kind, event.stage, event.microbatch), []).append(place)
    summed = "reduction" if barriers == 2 else "exchange"
    needs = {
        "broadcast": "F", "S": "broadcast", "exchange": "S", "T": "exchange", "reduction": "T",
        "B": summed, "I": summed,
    }  # fmt: skip
    for (kind, stage, microbatch), found in places.items():
        if kind in needs and stage == last:
            assert min(found) > max(places[needs[kind], last, microbatch])
        if kind == "F" and stage == 0 and ("lookup", last, microbatch) in places:
            assert min(found) > places["lookup", last, microbatch][0]
        if kind == "embedding_grad":
            half = "B" if ("B", 0, microbatch) in places else "W"
            assert min(found) > places[half, 0, microbatch][0]


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("loss", [0.0, 1.5, 12.0])
def test_one_forward_one_backward(ranks: int, loss: float) -> None:
    """One forward more than 1F1B's own, and the step is as long as if the loss were layers."""
    microbatches, layers = 8 * ranks, 8.0
    orders = one_forward_one_backward(ranks, microbatches)
    order = best_order(orders, even(ranks, ranks, layers, loss))
    assert order.in_flight == {stage: ranks - stage + 1 for stage in range(ranks)}
    ideal = microbatches * (3 * layers + loss / ranks) + (ranks - 1) * 3 * layers
    assert order.finish <= 1.01 * ideal
    assert order.hidden_held <= 4
    check_whole(order, [more_forwards(own, 1) for own in orders], microbatches)


@pytest.mark.parametrize("microbatches", [1, 3, 4, 5])
def test_few_microbatches(microbatches: int) -> None:
    orders = one_forward_one_backward(4, microbatches)
    order = best_order(orders, even(4, 4, 8.0, 4.0))
    check_whole(order, [more_forwards(own, 1) for own in orders], microbatches)
    assert max(order.in_flight.values()) <= min(microbatches, 5)


@pytest.mark.parametrize("name", ["Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_orders_of_torch(name: str, ranks: int) -> None:
    """More forwards than torch's own orders have: they cost little, and without them it takes long.

    Held against the same order without a loss whose layers take as much longer.
    """
    microbatches, layers, loss = 4 * ranks, 8.0, 6.0
    orders = order_of_torch(name, ranks, microbatches)
    order = best_order(orders, even(ranks, 2 * ranks, layers, loss))
    same_work = order_of(
        [more_forwards(own, 1) for own in orders],
        even(ranks, 2 * ranks, layers + loss / ranks / 3, 0.0),
    )
    plain = max(order.in_flight.values())
    assert order.finish <= 1.06 * same_work.finish
    held = order_of([more_forwards(own, 1) for own in orders], even(ranks, 2 * ranks, layers, 0.0))
    assert plain <= max(held.in_flight.values()) + 2
    for count in range(1, 4):
        moved = [more_forwards(own, count) for own in orders]
        try:
            check_whole(order, moved, microbatches)
        except AssertionError:
            continue
        break
    else:
        pytest.fail("the order is none of the schedule's own with some forwards more")


def test_random_costs_never_wait_in_a_circle() -> None:
    """300 drawn pipelines, uneven stages and slow links: every one ends, messages blocking."""
    generator = random.Random(1)
    for _ in range(300):
        ranks = generator.choice((2, 3, 4, 6))
        microbatches = generator.choice((1, 2, 3, ranks, ranks + 1, 2 * ranks, 11))
        drawn = [
            generator.choice((0.0, 1.0, 2.0, 5.0 * generator.random())) for _ in range(3 * ranks)
        ]
        costs = Costs(
            forward=lambda stage, drawn=drawn: drawn[stage],
            backward_input=lambda stage, drawn=drawn, ranks=ranks: drawn[ranks + stage],
            backward_weight=lambda stage, drawn=drawn, ranks=ranks: drawn[2 * ranks + stage],
            statistics=[2.0 * generator.random() for _ in range(ranks)],
            gradients=[generator.random() for _ in range(ranks)],
            message=generator.choice((0.0, 0.1, 3.0)),
            broadcast=generator.choice((0.0, 0.1, 3.0)),
            exchange=generator.choice((0.0, 0.1, 3.0)),
        )
        orders = one_forward_one_backward(ranks, microbatches)
        count = generator.choice((1, 2, 3))
        moved = [more_forwards(own, count) for own in orders]
        embedding = generator.random() < 0.5
        barriers = generator.choice((1, 2))
        order = order_of(moved, costs, barriers=barriers, embedding=embedding)
        check_whole(order, moved, microbatches, barriers, embedding)
        alone = forwards_alone(orders)
        check_whole(order_of(alone, costs, embedding=embedding), alone, microbatches, 1, embedding)


def test_two_barriers() -> None:
    """They take one microbatch more in flight, and no longer."""
    ranks, microbatches = 4, 32
    costs = even(ranks, ranks, 8.0, 6.0)
    swapped = Costs(
        costs.forward,
        costs.backward_input,
        costs.backward_weight,
        costs.gradients,
        costs.statistics,
    )
    orders = one_forward_one_backward(ranks, microbatches)
    one = best_order(orders, costs)
    two = best_order(orders, swapped, barriers=2)
    assert two.finish <= 1.01 * one.finish
    assert max(two.in_flight.values()) <= max(one.in_flight.values()) + 1


def test_more_forwards() -> None:
    own = one_forward_one_backward(2, 3)[1]
    assert "".join(task.kind for task in own) == "FBFBFB"
    moved = more_forwards(own, 1)
    assert "".join(task.kind for task in moved) == "FFBFBB"
    assert [task.microbatch for task in moved if task.kind == "F"] == [0, 1, 2]
    assert more_forwards(own, 0) == own


def test_a_rank_that_waits_for_itself_is_refused() -> None:
    """The last stage's backward cannot come before its forward."""
    wrong = [[Task("F", 0, 0), Task("B", 0, 0)], [Task("B", 1, 0), Task("F", 1, 0)]]
    with pytest.raises(ValueError, match="wait for one another at"):
        order_of(wrong, even(2, 2, 1.0, 1.0))
