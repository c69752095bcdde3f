# torchrun --nproc-per-node 2 examples/hugging_face.py
"""A Hugging Face model with a tied weight: in one process, and with its rows over two ranks.

`use_vocab_parallel_loss` changes the model in place. Sharded, each rank holds half of the weight's
rows and its own sequences; embedding and classifier are one parameter. Both have the gradients of
``model(**batch).loss``.
"""

import gc
import os
from copy import deepcopy

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config

from stage_groups import build_stage_groups
from vocab_parallel import (
    CCEPipelineLoss,
    TiedRows,
    VocabParallelClassifier,
    VocabParallelEmbedding,
    use_vocab_parallel_loss,
)


def main() -> None:
    """Compare both losses and their gradients with the model's own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    groups = build_stage_groups(pipeline=1, vocab=2)

    config = Qwen3Config(
        vocab_size=1001, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)  # the same model and batch on every rank
    model = AutoModelForCausalLM.from_config(config).to(device)
    tokens = torch.randint(config.vocab_size, (4, 32)).to(device)
    batch = {"input_ids": tokens, "labels": tokens}
    sharded = deepcopy(model)
    dense = model(**batch).loss
    dense.backward()
    exact = {name: parameter.grad for name, parameter in model.named_parameters()}

    model.zero_grad()
    use_vocab_parallel_loss(model)
    (loss := model(**batch).loss).backward()
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=0.0)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - exact[name]).norm() < 1e-4 * exact[name].norm(), name

    group, sizes = groups.vocab_group, (config.hidden_size, config.vocab_size)
    head = VocabParallelClassifier.from_linear(sharded.lm_head, group)
    embedding = VocabParallelEmbedding(*sizes, group=group, device=device)
    tied = TiedRows(embedding, head, groups.pipeline_group, first=0, last=0)
    body = sharded.model
    body.set_input_embeddings(embedding)
    own = tokens.chunk(2)[groups.vocab_rank]  # this rank's sequences
    loss = CCEPipelineLoss(head, hidden_layout="sharded")(body(own).last_hidden_state, own)
    loss.backward()
    tied.sum_gradients()  # does something where the ends are on two stages
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=0.0)
    for name, parameter in body.named_parameters():
        gradient, whole = parameter.grad, exact[f"model.{name}"]
        if parameter is head.weight:  # its rows are complete
            whole = whole[head.start : head.stop]
        else:
            dist.all_reduce(gradient, group=group)
        assert (gradient - whole).norm() < 1e-4 * whole.norm(), name
    print(f"loss {loss:.3f}, as the model's own; rows [{head.start}, {head.stop}) here")


if __name__ == "__main__":
    main()
    gc.collect()  # a group that is still held at the end may abort the interpreter
    dist.barrier()
    dist.destroy_process_group()
