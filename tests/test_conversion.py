"""Folders of mixtures of experts, each expert saved by itself: loaded, trained and exported."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from launch.arguments import TrainArguments
from launch.model import build_stage, layers_of_stage
from launch.training import run
from launch.training_pipeline import build_pipeline, model_of
from tests.ranks import run_ranks

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 12, "moe_intermediate_size": 16, "head_dim": 8},
    "mixtral": {"num_local_experts": 12},
    "deepseek_v3": {
        "n_routed_experts": 12, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
}  # fmt: skip
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
# A weight of an expert as each family's folders name it.
NAMES = {
    "qwen3_moe": "model.layers.2.mlp.experts.11.up_proj.weight",
    "mixtral": "model.layers.2.block_sparse_moe.experts.11.w3.weight",
    "deepseek_v3": "model.layers.2.mlp.experts.11.up_proj.weight",
}
SCHEDULES = {
    "qwen3_moe": "1F1B",
    "mixtral": "ZBVZeroBubble",
    "deepseek_v3": "InterleavedZeroBubble",
}
STEPS, BATCH, SEQUENCE, RATE = 3, 8, 16, 3e-3


def write_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """Let transformers write a tiny random model, a file for each few weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "rotary" not in name:
                tensor.add_(torch.randn_like(tensor), alpha=0.05)
    model.save_pretrained(folder, max_shard_size="40KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert NAMES[family] in index["weight_map"], "each expert is saved by itself"
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {n: w for file in folder.glob("*.safetensors") for n, w in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_as_by_transformers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bitwise, in the same dtypes; a stage reads the weights of its own layers alone."""
    folder = write_folder(tmp_path / "a", family, dtype)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    stored = weights_of(folder)
    seen: set[str] = set()
    for index in range(2):
        config, source = model_of(TrainArguments(model=str(folder)))
        own = build_stage(
            config, source, index, 2, None, device=torch.device("cpu"), dtype=dtype
        ).state_dict()
        for name, tensor in own.items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
        seen |= own.keys()
        layers = [f"model.layers.{n}." for n in layers_of_stage(index, 2, config)]
        layers += ["model.embed_tokens."] if index == 0 else ["model.norm.", "lm_head."]
        held = sum(w.nbytes for name, w in stored.items() if name.startswith(tuple(layers)))
        assert source.bytes_read == held
    assert seen == expected.keys()


def plain_losses(folder: Path, batches: Tensor) -> list[float]:
    """Train transformers' own model in one process, with its own loss; matrices alone decay."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def train_families(folder: str) -> None:
    """Train each family on the mesh and export it."""
    for family in FAMILIES:
        here = Path(folder) / family
        passed = run(
            TrainArguments(
                text=here / "ids.npy", model=str(here / "a"), steps=STEPS, batch=BATCH,
                sequence=SEQUENCE, microbatches=2, learning_rate=RATE, out=here / "out",
                learning_rate_schedule="constant", clip_norm=math.inf, shuffle=False,
                export=here / "b", schedule=SCHEDULES[family],
            ),
            torch.device("cpu"),
        )  # fmt: skip
        assert passed


def test_trained_on_ranks(tmp_path: Path) -> None:
    """The losses are transformers' own, and what is exported is the folder's form, trained."""
    torch.manual_seed(1)
    batches = torch.randint(SIZES["vocab_size"], (STEPS + 1, BATCH, SEQUENCE))
    expected = {}
    for family in FAMILIES:
        folder = write_folder(tmp_path / family / "a", family)
        numpy.save(tmp_path / family / "ids.npy", batches[:STEPS].flatten(0, 1).numpy())
        expected[family] = plain_losses(folder, batches)
    run_ranks(train_families, 4, folder=str(tmp_path), timeout=100)
    for family in FAMILIES:
        here = tmp_path / family
        losses = json.loads((here / "out" / "run.json").read_text())["losses"]
        assert losses == pytest.approx(expected[family][:STEPS], rel=2e-5), family
        before, after = weights_of(here / "a"), weights_of(here / "b")
        assert {n: w.shape for n, w in before.items()} == {n: w.shape for n, w in after.items()}
        assert not torch.equal(before[NAMES[family]], after[NAMES[family]]), "it was trained"
        again, info = AutoModelForCausalLM.from_pretrained(here / "b", output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            loss = float(again(input_ids=batches[STEPS], labels=batches[STEPS]).loss)
        assert loss == pytest.approx(expected[family][STEPS], rel=2e-5), family


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    """An expert that is missing, the router's loss, and weights that are quantised."""

    def refused(folder: Path, match: str) -> None:
        config, source = model_of(TrainArguments(model=str(folder)))
        with pytest.raises(ValueError, match=match):
            build_stage(config, source, 0, 1, None, device=torch.device("cpu"), dtype=torch.float32)

    whole = weights_of(write_folder(tmp_path / "a", "qwen3_moe"))
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    for file in (tmp_path / "a").glob("*.safetensors"):
        file.unlink()

    def keep(match: str) -> None:
        """Save the weights whose names match."""
        kept = {name: weight for name, weight in whole.items() if re.search(match, name)}
        assert len(kept) < len(whole)
        save_file(kept, tmp_path / "a" / "model.safetensors")

    keep(r"^(?!model.layers.2.mlp.experts.11.up_proj)")
    refused(tmp_path / "a", "made of 23 weights, .* which do not fit together")
    keep(r"^(?!model.layers.2.mlp.experts.11)")
    refused(tmp_path / "a", r"gate_up_proj is \[11, 32, 32\], but the model wants \[12, 32, 32\]")
    keep(r"^(?!model.layers.2.mlp.experts)")
    refused(tmp_path / "a", r"has no weight model\.layers\.2\.mlp\.experts\.gate_up_proj")

    arguments = TrainArguments(model=str(tmp_path / "a"))
    asked, source = model_of(arguments)
    asked.output_router_logits = True  # its balancing loss is over all layers together
    nothing: Any = None
    with pytest.raises(ValueError, match="adds the router's: set it to False"):
        build_pipeline(arguments, asked, source, nothing, torch.device("cpu"))

    config = tmp_path / "a" / "config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(raw | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="says that the weights are quantised"):
        model_of(TrainArguments(model=str(tmp_path / "a")))


OTHER_PARTS = {
    "gpt2": ({"n_embd": 32, "n_head": 4}, "transformer.wte, transformer.wpe, transformer.drop"),
    "gpt_neox": ({}, "gpt_neox.embed_in, .* gpt_neox.final_layer_norm"),
}


@pytest.mark.parametrize("family", OTHER_PARTS)
def test_models_of_other_parts(family: str, tmp_path: Path) -> None:
    """A folder of a family that cannot be cut is refused with what it is built of."""
    own, parts = OTHER_PARTS[family]
    config = AutoConfig.for_model(family, **own | {n: v for n, v in SIZES.items() if not own})
    config.num_hidden_layers = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"cannot be cut into stages: .* is built of {parts}"):
        model_of(TrainArguments(model=str(tmp_path)))
