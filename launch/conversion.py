"""The form that a model's weights have in files, where it is not that of its modules.

transformers keeps the experts of a layer in one parameter; most folders have each expert's weights
by themselves, some of them under older names. transformers' own rules, by which ``from_pretrained``
reads a folder and ``save_pretrained`` writes one, are applied here to single weights: a rank
converts what it holds and nothing else.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig

from launch.configs import model_without_memory

# Names of transformers that it does not promise to keep: 5.0 to 5.23 have them.
try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
        revert_weight_conversion,
    )
except ImportError as _error:
    _missing: str | None = str(_error)
else:
    _missing = None


@dataclass
class Stored:
    """What one weight of the model is made of.

    Attributes:
        names: in the files, in the order in which they are joined.
        patterns: of the rule, one for each name.
        rule: of transformers, that makes the weight of them; None where only the name differs.
        first: of the weights that the rule makes, the one that it is told of.
    """

    first: str
    names: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    rule: Any = None


class Conversion:
    """How the weights of a model come from those in its files.

    Args:
        config: of the model.
        names: of all weights in the files.

    Attributes:
        stored: what each weight of the model is made of, as far as the files have it.

    Raises:
        ValueError: a transformers without these rules.
    """

    def __init__(self, config: PretrainedConfig, names: Iterable[str]) -> None:
        _refuse_other_transformers()
        self._model = model_without_memory(config, torch.float32)
        wanted = self._model.state_dict()
        rules = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        self.stored: dict[str, Stored] = {}
        for name in sorted(names, key=dot_natural_key):  # expert 10 follows expert 9
            new, pattern = rename_source_key(
                name, renamings, converters, self._model.base_model_prefix, wanted
            )
            rule = by_pattern.get(pattern)
            for target in _made_by(rule, new):
                stored = self.stored.setdefault(target, Stored(new, rule=rule))
                stored.names.append(name)
                stored.patterns.append(pattern)

    def convert(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Return a weight that a rule makes; ``read`` returns a stored one by its name.

        Raises:
            ValueError: stored weights that do not fit together.
        """
        stored = self.stored[name]
        rule = deepcopy(stored.rule)
        for part, pattern in zip(stored.names, stored.patterns, strict=True):
            rule.add_tensor(stored.first, part, pattern, read(part))
        try:
            made = rule.convert(stored.first, model=self._model, config=self._model.config)[name]
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{name} is made of {len(stored.names)} weights, {stored.names[0]} to "
                f"{stored.names[-1]}, which do not fit together: {error}"
            ) from error
        whole: Tensor = made[0] if isinstance(made, list) else made
        return whole


def stored_form(config: PretrainedConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of the model under the names, and in the parts, that transformers saves.

    Raises:
        ValueError: a transformers without these rules.
    """
    _refuse_other_transformers()
    model = model_without_memory(config, torch.float32)
    found: dict[str, Tensor] = revert_weight_conversion(model, weights)
    return found


def _made_by(rule: Any, first: str) -> list[str]:
    """Return the weights that a rule makes together, the first of which is given."""
    if rule is None:
        return [first]
    return [first.replace(rule.target_patterns[0], one, 1) for one in rule.target_patterns]


def _refuse_other_transformers() -> None:
    if _missing is not None:
        raise ValueError(
            f"transformers {transformers.__version__} converts names in a way that is not known "
            f"here ({_missing}): install one from 5.0 to 5.23"
        )
