"""What holds a process group: its copies share the group, and no pickle is made of it."""

import copy
from typing import Any, Self, SupportsIndex


class SharesGroup:
    """A base of classes whose attribute ``group`` is a process group or None.

    A shallow and a deep copy hold the same group: another one would have to be made by all of its
    ranks together. A pickle cannot hold a group, which does not exist where the pickle is read.
    With ``group=None``, the default group, an object is pickled as usual.

    Raises:
        ValueError: on being pickled, by torch.save for instance, while it holds a group.
    """

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__setstate__(super().__getstate__())
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        group: Any = getattr(self, "group", None)
        copied = type(self).__new__(type(self))
        memo[id(self)], memo[id(group)] = copied, group
        copied.__setstate__(copy.deepcopy(super().__getstate__(), memo))
        return copied

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if getattr(self, "group", None) is not None:
            raise ValueError(
                f"{type(self).__name__} holds a process group, which cannot be pickled: save the "
                f"state_dict() of a module; or use group=None, the default group"
            )
        return super().__reduce_ex__(protocol)
