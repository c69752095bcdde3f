"""What a GPU does in a second, and where that number is from."""

import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Self

# Dense bfloat16 FLOP/s of data sheets, by what torch calls the device; the first that is in it.
_PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
# What the runtime, the allocator's gaps and the communicators take of a GPU's memory; assumed.
RESERVED = 0.06
# How far below and above a card's memory a size may be and still mean that card: 80GB and 80GiB.
_ALIKE = (0.8, 1.1)


def peak_of(name: str) -> float | None:
    """Return a device's dense bfloat16 FLOP/s by its name; None where it is not known."""
    return next((peak for known, peak in _PEAKS.items() if known in name), None)


@dataclass(frozen=True)
class Hardware:
    """Attributes: name; bytes of memory; rates; "measured" or "data sheet" for each.

    product_flops: of large bfloat16 matrix products. layer_flops: of a decoder layer, forward and
    backward, everything between its products included. copy_bytes: of a copy in device memory,
    bytes read and written. link_bytes: that one GPU sends to its neighbours. loss_overhead: of each
    way of backward, its time over that of its products and passes at these rates. compiled_speed:
    how many times as fast a layer is that torch.compile has compiled; compiled_kept: what it keeps
    for its backward, of what it would keep otherwise. node_bytes: that a GPU sends to one in
    another node, of node_gpus; None for as many as within.
    """

    name: str
    memory: float
    product_flops: float
    layer_flops: float
    copy_bytes: float
    link_bytes: float
    loss_overhead: dict[str, float]
    sources: dict[str, str]
    compiled_speed: float = 1.0
    compiled_kept: float = 1.0
    node_bytes: float | None = None
    node_gpus: int = 8

    @property
    def room(self) -> float:
        """Bytes that a plan may use."""
        return self.memory * (1 - RESERVED)

    def link_of(self, ranks: int) -> float:
        """Return the bytes that a GPU sends to another of so many ranks that follow one another."""
        if self.node_bytes is None or ranks <= self.node_gpus:
            return self.link_bytes
        return min(self.link_bytes, self.node_bytes)

    @classmethod
    def load(cls, name: str) -> Self:
        """Read a shipped file by its name, or one of your own by its path.

        Raises:
            ValueError: no such hardware, or a file without what is needed.
        """
        shipped = _shipped()
        if name in shipped:
            text = shipped[name].read_text()
        elif Path(name).is_file():
            text = Path(name).read_text()
        else:
            raise ValueError(f"unknown hardware {name!r}: give a file, or one of {sorted(shipped)}")
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(f"hardware {name!r} cannot be read: {error}") from error

    @classmethod
    def with_memory(cls, memory: float) -> Self:
        """Return the shipped hardware that has about so many bytes, the fastest.

        Raises:
            ValueError: none has.
        """
        known = {name: cls.load(name) for name in sorted(_shipped())}
        low, high = _ALIKE
        alike = [one for one in known.values() if low <= memory / one.memory <= high]
        if not alike:
            names = ", ".join(f"{name} {one.memory / 1e9:.0f}GB" for name, one in known.items())
            raise ValueError(
                f"--gpu-memory {memory / 1e9:.0f}GB is of no GPU whose speed is known here "
                f"({names}): give --hardware FILE, which --calibrate writes, or the name whose "
                f"speed is to be taken"
            )
        return min(alike, key=lambda one: (abs(one.memory - memory), -one.product_flops))

    def save(self, path: Path) -> None:
        """Write a file that `load` reads."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def _shipped() -> dict[str, Traversable]:
    return {
        path.name.removesuffix(".json"): path
        for path in files(__name__).iterdir()
        if path.name.endswith(".json")
    }
