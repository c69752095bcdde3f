"""The chunked implementation holds a bounded buffer of logits, whatever the sizes."""

import pytest
import torch

from tests.recording import AllocationRecorder
from vocab_parallel import linear_cross_entropy
from vocab_parallel.plan import tile_shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("budget", [2**18, 2**20])
def test_largest_intermediate(dtype: torch.dtype, softcap: float | None, budget: int) -> None:
    tokens, rows, hidden = 512, 4096, 16
    e = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    c = torch.randn(rows, hidden, dtype=dtype, requires_grad=True)
    targets = torch.randint(rows, (tokens,))
    # Both gradients, in float32, are smaller than the budget: what remains is logits.
    assert max(tokens, rows) * hidden * 4 <= budget
    assert tokens * rows * 4 > 4 * budget
    with AllocationRecorder([e, c, targets]) as seen:
        loss = linear_cross_entropy(
            e,
            c,
            targets,
            softcap=softcap,
            impl="chunked",
            backward="recompute",
            memory_budget=budget,
        )
        loss.backward()
    assert seen.largest.size <= budget, seen.largest


def test_reference_is_seen_to_materialise() -> None:
    """The recorder would notice whole logits."""
    e, c = torch.randn(64, 4, requires_grad=True), torch.randn(256, 4)
    with AllocationRecorder([e, c]) as seen:
        linear_cross_entropy(e, c, torch.randint(256, (64,)), impl="reference")
    assert seen.largest.size >= 64 * 256 * 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tokens", [1, 127, 8192, 1_000_000])
@pytest.mark.parametrize("rows", [1, 37_984, 248_320])
@pytest.mark.parametrize("budget", [12, 2**20, 2**28])
def test_tiles_fit(device: str, tokens: int, rows: int, budget: int) -> None:
    tile = tile_shape(tokens, rows, 12, budget, device)
    assert 1 <= tile.tokens <= tokens
    assert 1 <= tile.rows <= rows
    assert tile.tokens * tile.rows * 12 <= budget


def test_budget_below_one_logit() -> None:
    e, c = torch.randn(4, 2), torch.randn(8, 2)
    with pytest.raises(ValueError, match="memory_budget is 4 bytes"):
        linear_cross_entropy(e, c, torch.zeros(4, dtype=torch.long), memory_budget=4)
