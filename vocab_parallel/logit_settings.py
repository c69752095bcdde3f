"""What a causal language model does besides its classifier, read from its configuration.

A scale that is missed gives a loss that looks right and is not: what is not known is refused.
Nothing of transformers is imported; its configurations are objects with attributes.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypedDict

from vocab_parallel.settings import is_positive

Kind = Literal["softcap", "multiplier", "divisor"]


class LogitSettings(TypedDict):
    """Keyword arguments of `linear_cross_entropy`."""

    softcap: float | None
    temperature: float


# The settings of the logits of transformers' own causal models. A divisor of the hidden states
# is one of the logits: the classifiers of these models have no bias.
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "final_logit_softcapping": "softcap",  # Gemma 2 to 4, VaultGemma, NanoChat, Beam
        "logits_soft_cap": "softcap",  # RecurrentGemma
        "output_logit_soft_cap": "softcap",  # xLSTM
        "logit_scale": "multiplier",  # Cohere
        "lm_head_multiplier": "multiplier",  # Falcon-H1
        "logits_scaling": "divisor",  # Granite; of the hidden states in MiniCPM3
        "logits_mup_width_multiplier": "divisor",  # of the hidden states in Inkling
    }
)
# Where a model_type means another thing by a name; None where its forward does not read it.
EXCEPTIONS: Mapping[tuple[str, str], Kind | None] = MappingProxyType(
    {
        ("hyperclovax", "logits_scaling"): "multiplier",
        ("minicpm3", "dim_model_base"): None,  # its logits_scaling is computed from it
        ("mpt", "logit_scale"): None,
    }
)
# Scales without "logit" in their names, of models whose code is not in transformers, or which
# apply them before a softcap: refused.
REFUSED = frozenset(
    {"dim_model_base", "mup_width_multiplier", "output_multiplier", "output_multiplier_scale"}
)
# Models of several modalities that do to their logits what their text_config says; Gemma 3's,
# Aya Vision's and others ignore it.
APPLY_TEXT_CONFIG = frozenset(
    {
        "gemma3n",
        "gemma4",
        "gemma4_unified",
        "hyperclovax_vision_v2",
        "mistral_large4",
        "paligemma",
    }
)

_UNSHIFTED = "compares position t with label t instead of label t + 1"
_CODEBOOKS = "is the mean over several codebooks, each with its own classifier"
# By model_type, the models whose own loss is another one.
OTHER_LOSSES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small"), _UNSHIFTED),
        **dict.fromkeys(("cpmant", "marian", "mbart", "mvp", "pegasus", "plbart"), _UNSHIFTED),
        **dict.fromkeys(("trocr", "whisper", "xlnet"), _UNSHIFTED),
        **dict.fromkeys(("musicgen_decoder", "musicgen_melody_decoder"), _CODEBOOKS),
        "git": "leaves out the positions of an image before the text",
        "prophetnet": "adds up those of several tokens ahead",
    }
)


def logit_settings(config: Any) -> LogitSettings:
    """Return what makes the logits of `linear_cross_entropy` the model's own.

    Args:
        config: the model's configuration; None, or one without such a setting, gives no softcap
            and the temperature 1.

    Raises:
        ValueError: a setting of the logits that is not known, that the model may not apply, or
            that is not a positive number; several settings, whose order is not known; or rows
            of the classifier that the model cuts off.
    """
    found: dict[str, tuple[Kind, float]] = {}
    parts = list(_parts(config))
    for part in parts:
        _refuse_unused_rows(part)
        applies = part is parts[-1] and (part is config or _family(config) in APPLY_TEXT_CONFIG)
        for name in _names(part):
            key, value = (_family(part), name), _read(part, name)
            kind = EXCEPTIONS.get(key, KINDS.get(name))
            if _is_neutral(name, kind, value) or (key in EXCEPTIONS and kind is None):
                continue
            if kind is None:
                raise ValueError(
                    f"expected settings of the logits that are known, got {name}={value!r} in the "
                    f"configuration of {_family(part)}: known are {sorted(KINDS)}; {_REMEDY}"
                )
            if not applies:
                raise ValueError(
                    f"expected settings of the logits that the model is known to apply, got "
                    f"{name}={value!r} of {_family(part)} within {_family(config)}: known are "
                    f"those of the text_config of {sorted(APPLY_TEXT_CONFIG)}; {_REMEDY}"
                )
            if not is_positive(value):
                raise ValueError(
                    f"{name} must be a positive number, got {value!r}: a model with such logits "
                    f"does not train"
                )
            found[name] = kind, float(value)
    if len(found) > 1:
        raise ValueError(
            f"expected one setting of the logits at most, got {sorted(found)} in the configuration "
            f"of {_family(config)}: in which order they apply is not known, so give "
            f"linear_cross_entropy a softcap and a temperature yourself"
        )
    settings = LogitSettings(softcap=None, temperature=1.0)
    for kind, value in found.values():
        if kind == "softcap":
            settings["softcap"] = value
        else:
            settings["temperature"] = value if kind == "divisor" else 1.0 / value
    return settings


def refuse_other_losses(config: Any) -> None:
    """Refuse a model whose own loss is more, or other, than the mean over shifted labels.

    Args:
        config: the model's configuration, or None.

    Raises:
        ValueError: an encoder-decoder, a model with another loss, or with an auxiliary one.
    """
    for part in _parts(config):
        family = _family(part)
        z_loss = _read(part, "z_loss_coefficient")
        for is_so, expected in (
            (
                _read(part, "is_encoder_decoder"),
                f"a model of a decoder alone, got {family}, whose labels are not its inputs: "
                f"{_OWN_LOSS}",
            ),
            (
                family in OTHER_LOSSES,
                f"a loss over labels that are shifted by one, got that of {family}, which "
                f"{OTHER_LOSSES.get(family)}: {_OWN_LOSS}",
            ),
            (
                _read(part, "output_router_logits"),
                f"a loss without auxiliary terms, got output_router_logits=True in the "
                f"configuration of {family}, which adds the router's: set it to False, or add "
                f"that term yourself",
            ),
            (
                z_loss,
                f"a loss without auxiliary terms, got z_loss_coefficient={z_loss!r} in the "
                f"configuration of {family}, which averages over ignored labels too: set it to 0, "
                f"and pass z_loss for one over the labels that count",
            ),
        ):
            if is_so:
                raise ValueError(f"expected {expected}")


_OWN_LOSS = "give its hidden states and labels to linear_cross_entropy as its loss wants them"
_REMEDY = (
    "if the model ignores it, set it to None; if not, give its hidden states to "
    "linear_cross_entropy with the softcap and the temperature that it applies"
)


def _refuse_unused_rows(part: Any) -> None:
    used, rows = _read(part, "unpadded_vocab_size"), _read(part, "vocab_size")
    if isinstance(used, int) and isinstance(rows, int) and used < rows:
        raise ValueError(
            f"expected a model that uses every row of its classifier, got unpadded_vocab_size="
            f"{used} with vocab_size={rows} in the configuration of {_family(part)}: give its "
            f"hidden states to linear_cross_entropy with vocab_parallel_options="
            f"VocabParallelOptions(0, {rows}, None, vocab_size={used})"
        )


def _parts(config: Any) -> Iterator[Any]:
    """Yield the configuration and, of a model of several modalities, that of its text."""
    if config is not None:
        yield config
        text = _read(config, "text_config")
        if text is not None:
            yield text


def _names(part: Any) -> list[str]:
    """Return the names that are, or look like, settings of the logits; properties included."""
    given = part if isinstance(part, Mapping) else vars(part)
    return sorted({*KINDS, *REFUSED} | {name for name in given if _looks_like_a_setting(name)})


def _looks_like_a_setting(name: str) -> bool:
    return (
        any(word in name for word in ("logit", "lm_head"))
        and any(word in name for word in ("scale", "scaling", "cap", "mult"))
        and not any(word in name for word in ("att", "router", "gate"))  # inside of layers
    )


def _is_neutral(name: str, kind: Kind | None, value: object) -> bool:
    if value is None or (kind is None and value is False):
        return True
    is_cap = kind == "softcap" or (kind is None and "cap" in name)
    return not is_cap and not isinstance(value, bool) and value == 1


def _family(config: Any) -> str:
    return str(_read(config, "model_type") or type(config).__name__)


def _read(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)
