"""What torchrun prints of a rank that failed, from a file that the rank writes."""

from collections.abc import Callable
from typing import TypeVar

from torch.distributed.elastic.multiprocessing.errors import record as _record
from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

from launch.command import partial_name

F = TypeVar("F", bound=Callable[..., object])


class LastWords(ErrorHandler):
    """torch's own, whose file is there when it is whole.

    torchrun ends, without its restarts, where it finds the file of a rank that was killed while it
    wrote.
    """

    def record_exception(self, e: BaseException) -> None:
        """Write an error to the file that torchrun reads, if there is one."""
        super().record_exception(e)
        path = super()._get_error_file_path()
        if path is not None:
            partial_name(path).rename(path)

    def _get_error_file_path(self) -> str | None:
        path = super()._get_error_file_path()
        return None if path is None else str(partial_name(path))


def record(function: F) -> F:
    """Decorate what a rank runs, in the place of torch's decorator of that name."""
    decorated: F = _record(function, error_handler=LastWords())  # type: ignore[assignment]
    return decorated
