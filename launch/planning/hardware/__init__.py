"""What a GPU does in a second, and where that number is from."""

import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Hardware:
    """Attributes: name; bytes of memory; rates; "measured" or "data sheet" for each.

    product_flops: of large bfloat16 matrix products. layer_flops: of a decoder layer, forward and
    backward, everything between its products included. copy_bytes: of a copy in device memory,
    bytes read and written. link_bytes: that one GPU sends to its neighbours. loss_overhead: of each
    way of backward, its time over that of its products and passes at these rates.
    """

    name: str
    memory: float
    product_flops: float
    layer_flops: float
    copy_bytes: float
    link_bytes: float
    loss_overhead: dict[str, float]
    sources: dict[str, str]

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
        """Return the shipped hardware of the least memory that has so many bytes, the fastest.

        Raises:
            ValueError: none has as much.
        """
        known = [cls.load(name) for name in _shipped()]
        enough = [one for one in known if one.memory >= memory]
        if not enough:
            most = max(known, key=lambda one: one.memory)
            raise ValueError(
                f"--gpu-memory {memory / 1e9:.0f}GB is more than the {most.memory / 1e9:.0f}GB of "
                f"the {most.name}: give --hardware FILE, which --calibrate writes"
            )
        return min(enough, key=lambda one: (one.memory, -one.product_flops))

    def save(self, path: Path) -> None:
        """Write a file that `load` reads."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def _shipped() -> dict[str, Traversable]:
    return {
        path.name.removesuffix(".json"): path
        for path in files(__name__).iterdir()
        if path.name.endswith(".json")
    }
