"""Checkpoints of transformers' Trainer where ranks hold a classifier's rows each."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from vocab_parallel.modules.sharded_linear import is_sharded, own_rows


class WholeRowsCallback:
    """Lets Trainer save and resume a model of ``use_vocab_parallel_loss(model, mesh=mesh)``.

    Under DDP Trainer saves what its first rank has. With this callback that rank has whole rows,
    of the model and of the optimizer's state, when Trainer saves after a step or an epoch: every
    rank sends its own, and the first one keeps the whole on the CPU until it is written. Such a
    checkpoint is that of a whole model and resumes on any number of ranks; each takes its own rows.
    Without a mesh it resumes where the optimizer has one group of parameters, given to Trainer by
    ``optimizers=``: of its own optimizer Trainer makes other groups with a mesh.

        Trainer(model, ..., callbacks=[WholeRowsCallback()])

    For ``trainer.save_model()`` after training, every rank calls `remove_vocab_parallel_loss`
    first. ``save_strategy="best"`` decides too late for it; Trainer then stops with an error.
    It is no TrainerCallback by class, since nothing of transformers is imported; Trainer asks it
    for each event by name.
    """

    def __init__(self) -> None:
        self._whole: dict[Tensor, Tensor] = {}  # of a weight or a moment of this rank's rows
        self._hooks: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):  # an event that is none of ours
            return lambda *_, **__: None
        raise AttributeError(name)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any
    ) -> None:
        """Take this rank's rows of what a checkpoint had, and have the whole at hand for others."""
        bare = _bare(optimizer)
        for parameter, moments in bare.state.items():
            if isinstance(parameter, DTensor):
                for name, value in moments.items():
                    if value.shape == parameter.shape and not isinstance(value, DTensor):
                        moments[name] = own_rows(value, parameter)
        self._hooks = [bare.register_state_dict_post_hook(self._with_whole_moments)]
        for module in filter(is_sharded, model.modules()):
            # A partial, because torch sets an attribute, which a method does not take.
            hook = partial(self._with_whole_weights)
            self._hooks.append(module.register_state_dict_post_hook(hook))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave model and optimizer as they were."""
        for hook in self._hooks:
            hook.remove()

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any
    ) -> None:
        """Gather the rows if Trainer saves next; every rank comes here."""
        if control.should_save:
            self._gather(model, _bare(optimizer))

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Free what was written."""
        self._whole.clear()

    @torch.no_grad()
    def _gather(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._whole.clear()
        sharded = filter(is_sharded, model.modules())
        # Of tied modules once.
        for parameter in dict.fromkeys(own for module in sharded for own in module.parameters()):
            for rows in (parameter, *optimizer.state.get(parameter, {}).values()):
                if isinstance(rows, DTensor):
                    whole = rows.full_tensor()
                    if rows.device_mesh.get_rank() == 0:
                        self._whole[rows] = whole.cpu()

    def _with_whole_weights(self, module: nn.Module, state: Any, prefix: str, _: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in self._whole:
                state[prefix + name] = self._whole[parameter]

    def _with_whole_moments(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        whole: dict[str, Any] = tree_map_only(DTensor, lambda own: self._whole.get(own, own), state)
        return whole


def _bare(optimizer: Any) -> Any:
    """Return torch's optimizer in accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
