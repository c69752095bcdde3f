"""Every causal family of transformers: the loss is the model's own, or a ValueError.

`make docs` writes docs/causal-families.md anew; the test fails where the page says otherwise.
"""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from launch.configs import model_without_memory
from launch.logit_settings import logit_settings
from launch.model import build_stage
from launch.weights import FolderWeights, RandomWeights
from tests.oracle import relative_error
from tests.ranks import ROOT
from vocab_parallel import (
    linear_cross_entropy,
    remove_vocab_parallel_loss,
    use_vocab_parallel_loss,
)

PAGE = ROOT / "docs" / "causal-families.md"
VOCABULARY, MOST_PARAMETERS = 97, 10_000_000
# Models of several modalities whose text has settings, and which apply them or do not.
SEVERAL_MODALITIES = (
    *("aya_vision", "cohere2_vision", "hyperclovax_vision_v2", "mistral_large4", "paligemma"),
)
# What makes a model small, by the names that configurations have for it; others are left out.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 32, "d_model": 32, "word_embed_proj_dim": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "decoder_layers": 2, "encoder_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "rotary_dim": 4, "max_position_embeddings": 64,
    "use_cache": False, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "ffn_dim": 32, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_d_state": 8, "image_size": 16, "patch_size": 8, "vocab_size_per_layer_input": 97,
    "n_shared_experts": 1, "num_kv_shared_layers": 0, "hidden_size_global": 32,
    "encoder_hash_byte_group_vocab": 97,
}  # fmt: skip
# What a family wants besides, or instead.
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            }
        }
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "mimo_v2_flash": {"num_key_value_heads": 2, "head_dim": 24},
    "prophetnet": {"num_encoder_layers": 1, "num_decoder_layers": 1},
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16)},
    "roc_bert": {"pronunciation_vocab_size": 97, "shape_vocab_size": 97},
    "xlnet": {"n_layer": 2, "n_head": 4, "d_head": 8, "d_inner": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
# Far from neutral, so that a loss which misses one is another loss.
SETTINGS = {
    "final_logit_softcapping": 0.1, "logits_soft_cap": 0.1, "output_logit_soft_cap": 0.1,
    "logit_scale": 3.0, "lm_head_multiplier": 3.0, "logits_scaling": 3.0,
    "logits_mup_width_multiplier": 3.0,
}  # fmt: skip
NEUTRAL = {"softcap": None, "temperature": 1.0}


class NotBuiltError(Exception):
    """This family has no tiny model here, and why."""


def sizes_of(default: Any) -> dict[str, Any]:
    """Return the sizes and settings that a configuration has names for."""
    names = vars(default).keys() | getattr(default, "attribute_map", {}).keys()
    return {name: value for name, value in (SIZES | SETTINGS).items() if name in names}


def tiny_model(family: str, **more: Any) -> Any:
    """Build a model of random weights, biases among them."""
    try:
        default = AutoConfig.for_model(family)
        given = sizes_of(default)
        for name in getattr(default, "sub_configs", {}):
            part = getattr(default, name, None)
            if part is not None:
                given[name] = {"model_type": part.model_type, **sizes_of(part)}
        config = AutoConfig.for_model(family, **given | FAMILIES.get(family, {}) | more)
        auto: Any = AutoModelForCausalLM
        if family in SEVERAL_MODALITIES:
            auto = AutoModelForImageTextToText
        with torch.device("meta"):
            count = auto.from_config(config, dtype=torch.float32).num_parameters()
        if count > MOST_PARAMETERS:
            raise NotBuiltError(f"{count:,} parameters")
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32).eval()
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(short(str(error.__cause__ or error))) from error
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def short(words: str) -> str:
    """Return the first hundred characters as a cell of a table."""
    return re.sub(r"[\s|`]+", " ", words).strip()[:100]


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, 5:], labels[1, 2], mask[0, 6:] = -100, -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def head_of(model: Any) -> str:
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    bias = " with a bias" if getattr(head, "bias", None) is not None else ""
    return f"`{names[0]}`, {type(head).__name__}{bias}" if names else "none"


def what_the_loss_was_given(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Return a changed model's loss, and the settings that its forward came to."""
    given: dict[str, Any] = {}

    def spy(*args: Any, **options: Any) -> Tensor:
        given.update(options)
        return linear_cross_entropy(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vocab_parallel.transformers.linear_cross_entropy", spy)
        return model(**inputs).loss, given


@torch.no_grad()
def outcome(family: str) -> tuple[str, str, str]:
    """Return (head, settings, outcome) of a family; fail where its loss is another one."""
    try:
        model = tiny_model(family)
    except NotBuiltError as reason:
        return "", "", f"not built: {reason}"
    head = head_of(model)
    inputs = batch()
    try:
        expected = model(**inputs).loss
        assert expected is not None, "no loss"
    except Exception as error:
        return head, "", f"not run: its own forward says {short(str(error))}"
    try:
        use_vocab_parallel_loss(model)
        found, given = what_the_loss_was_given(model, inputs)
    except ValueError as error:
        words = str(error).partition(": ")[0].partition(", got ")[2]
        if not words:
            raise  # not one of ours
        return head, "", f"refused: {words}"
    assert relative_error(found, expected) < 1e-5, f"{family}: {found} for {expected}"
    check_launch_settings(model, inputs, expected)
    settings = [
        f"{name} {float(f'{given[name]:.3g}')}"
        for name, neutral in NEUTRAL.items()
        if given[name] != neutral
    ]
    return head, ", ".join(settings), "equal"


def check_launch_settings(model: Any, inputs: dict[str, Tensor], expected: Tensor) -> None:
    """Where launch can cut a model, the settings that it reads give the model's own loss."""
    try:
        model_without_memory(model.config, torch.float32)
    except ValueError:
        return
    settings = logit_settings(model.config)
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    found = linear_cross_entropy(hidden, model.lm_head.weight, labels, shift=1, **settings)
    assert relative_error(found, expected) < 1e-5, model.config.model_type


def test_every_family() -> None:
    """A family that builds is equal to 1e-5 or refused; the page says which."""
    lines = [
        "# The loss of every causal family",
        "",
        f"`use_vocab_parallel_loss` on a tiny random model of each causal family of transformers "
        f"{transformers.__version__},",
        "and of some of several modalities with text alone: made by `make docs` of what passes.",
        "*equal*: the loss is that of the model unchanged to 1e-5, with settings far from neutral;",
        "*refused*: what the ValueError says that it got; *not built*, *not run*: what",
        "transformers says of the tiny model. There is no third outcome: where two losses differ,",
        "the test fails.",
        "The third column is what the model does to its logits, as the loss was told.",
        "",
        "| family | classifier | its logits | outcome |",
        "|---|---|---|---|",
    ]
    families = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *SEVERAL_MODALITIES})
    for family in families:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cells = outcome(family)
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    made = "\n".join(lines) + "\n"
    if os.environ.get("WRITE_DOCS") == "1":
        PAGE.write_text(made)
    assert PAGE.read_text() == made, "docs/causal-families.md is stale: run `make docs`"


@pytest.mark.parametrize(
    "families",
    [
        ["cohere", "gemma2", "gptj", "granite", "hyperclovax", "llama", "minicpm3", "opt", "xlstm"],
        pytest.param([], marks=pytest.mark.slow, id="all"),
    ],
)
def test_gradients(families: list[str]) -> None:
    """Of every parameter, together, of Trainer's divisor too."""
    for family in families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not families and outcome(family)[-1] != "equal":
                continue
            model, inputs = tiny_model(family), batch()
        if family == "reformer":
            continue  # it has gradients in training mode alone, with dropout of its own
        trained = [own for own in model.parameters() if own.requires_grad]
        for more in ({}, {"num_items_in_batch": 29}):
            use_vocab_parallel_loss(model)
            ours = gradients(model, {**inputs, **more}, trained)
            remove_vocab_parallel_loss(model)
            exact = gradients(model, {**inputs, **more}, trained)
            assert relative_error(ours, exact) < 1e-5, family


def gradients(model: Any, inputs: dict[str, Any], trained: list[Tensor]) -> Tensor:
    try:
        loss = model(**inputs).loss
    except TypeError:  # its forward has no num_items_in_batch
        return torch.zeros(1)
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return torch.cat([own.flatten() for own in found if own is not None])


@pytest.mark.parametrize("family", ["diffllama", "doge", "granitemoehybrid"])
def test_two_stages_are_the_model(family: str, tmp_path: Path) -> None:
    """Of attention that adds to its mask, and of no rotary positions."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    config, source = model.config, FolderWeights(tmp_path, model.config)
    cpu = torch.device("cpu")
    hidden = ids = batch()["input_ids"]
    for stage in range(2):
        built = build_stage(config, source, stage, 2, None, device=cpu, dtype=torch.float32)
        hidden = built.eval().hidden_states(hidden)
    assert relative_error(hidden, model.model(ids).last_hidden_state) < 1e-6


def test_layers_that_are_counted_otherwise() -> None:
    """A family whose configuration counts other layers than its model has is refused."""
    config = AutoConfig.for_model("longcat_flash", vocab_size=97, hidden_size=32, num_layers=2)
    with pytest.raises(ValueError, match="2 layers where its configuration counts 4"):
        build_stage(
            config, RandomWeights(0, 0.02), 0, 1, None, device=torch.device("cpu"),
            dtype=torch.float32,
        )  # fmt: skip
