"""An optimizer's state of rows, named in its state dict as the module names the rows themselves.

torch.distributed.checkpoint.state_dict reads ``optimizer.state_dict()``, where each rank has a
tensor of its own rows under the name that all ranks have. Nothing of an optimizer passes through
the module that owns the rows, so its first step is where it is seen: torch's `get_state_dict` and
`set_state_dict` take one themselves where there is no state yet.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vocab_parallel.entry import entry
from vocab_parallel.modules.checkpoint import OwnRows, rows_of

_SEEN = "names_vocab_rows"
Change = Callable[[str, Tensor, Tensor, OwnRows], Tensor]  # of a key's value, of a parameter


@cache
def watch_optimizers() -> None:
    """Name rows in the state dict of every optimizer of this process that trains some."""
    register_optimizer_step_pre_hook(_see)


@entry
def _see(optimizer: Optimizer, *_: Any) -> None:
    """Give an optimizer of sharded rows the hooks of its state dict, once."""
    if getattr(optimizer, _SEEN, False):
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(map(_sharded_rows, parameters)):
        return
    for parameter in parameters:
        if parameter in optimizer.state:  # loaded before it was seen
            optimizer.state[parameter] = _changed(optimizer.state[parameter], parameter, _taken)
    optimizer.register_state_dict_post_hook(partial(_with_state, change=_named))
    optimizer.register_load_state_dict_pre_hook(partial(_with_state, change=_taken))
    setattr(optimizer, _SEEN, True)


def _named(key: str, value: Tensor, parameter: Tensor, rows: OwnRows) -> Tensor:
    if value.shape != parameter.shape:
        raise ValueError(
            f"the optimizer keeps a {key} {list(value.shape)} of rows {list(parameter.shape)} of "
            f"the vocabulary, and a state dict cannot tell which rows that is of: save "
            f"optimizer.state[parameter] on each rank by itself, or use an optimizer whose state "
            f"is as large as its parameters"
        )
    return rows.name(value)


def _taken(_: str, value: Tensor, parameter: Tensor, rows: OwnRows) -> Tensor:
    return rows.take(value, parameter)


def _with_state(optimizer: Optimizer, state_dict: dict[str, Any], change: Change) -> dict[str, Any]:
    """Return a state dict in which the state of sharded rows is changed.

    Its parameters are numbers, or names where torch's `set_optimizer_state_dict` made it.
    """
    state = dict(state_dict["state"])
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for parameter, known_as in zip(group["params"], saved["params"], strict=False):
            if known_as in state:
                state[known_as] = _changed(state[known_as], parameter, change)
    return {**state_dict, "state": state}


def _changed(state: dict[str, Any], parameter: Tensor, change: Change) -> dict[str, Any]:
    """Return a parameter's state; of sharded rows, with all changed but what is one number."""
    rows = _sharded_rows(parameter)
    if rows is None:
        return state

    def has_rows(value: Any) -> bool:
        return isinstance(value, Tensor) and (value.numel() != 1 or value.shape == parameter.shape)

    return {
        key: change(key, value, parameter, rows) if has_rows(value) else value
        for key, value in state.items()
    }


def _sharded_rows(parameter: Tensor) -> OwnRows | None:
    rows = rows_of(parameter)
    return rows if rows is not None and len(rows.row_counts) > 1 else None
