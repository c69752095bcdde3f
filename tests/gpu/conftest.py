"""Everything in this folder needs a CUDA device; `make test-gpu` runs it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def leave_the_device_to_others() -> Iterator[None]:
    """Give back what torch caches: several workers share the device."""
    yield
    torch.cuda.empty_cache()
