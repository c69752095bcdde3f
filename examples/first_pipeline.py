# torchrun --nproc-per-node 4 examples/first_pipeline.py
"""Two stages, whose last one is two ranks that share the classifier's rows."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import vocab_parallel as vp
from stage_groups import build_stage_groups


def main() -> None:
    """Train on one batch: the loss falls."""
    groups = build_stage_groups(pipeline=2, vocab=2)
    torch.manual_seed(0)
    module, loss = nn.Sequential(nn.Embedding(1000, 32), nn.Linear(32, 32)), vp.no_loss
    if is_last := groups.has_last_stage(num_stages=2):
        rows = vp.VocabParallelClassifier(32, 1000, group=groups.vocab_group)
        module, loss = nn.Sequential(nn.Linear(32, 32), rows), vp.CCEPipelineLoss(rows)
    device, group = torch.device("cpu"), groups.pipeline_group
    stage = PipelineStage(module, groups.pipeline_rank, 2, device, group=group)
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=loss, scale_grads=False)
    vp.validate_pipeline_loss(schedule, loss)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    tokens = torch.randint(1000, (8, 16))
    for step in range(10):
        losses: list[torch.Tensor] = []
        if is_last:
            loss.num_valid_tokens = vp.count_valid_tokens(tokens, shift=1)
            schedule.step(target=tokens, losses=losses, return_outputs=False)
            print(f"step {step}: loss {sum(losses).item():.3f}")
        else:
            schedule.step(tokens)
        optimizer.step()
        optimizer.zero_grad()
    assert not is_last or sum(losses) < 6.0


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.barrier()
    dist.destroy_process_group()
