"""A head that is more than its weight: known and right, or refused; alone and sharded."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stage_groups import build_stage_groups
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.toy_pipeline import Pipeline, Setting, draw_batch, one_process
from vocab_parallel import CCEPipelineLoss, VocabParallelClassifier, linear_cross_entropy
from vocab_parallel.modules.heads import LowRank, Rows

TOKENS, HIDDEN, VOCABULARY, RANK = 12, 8, 23, 3


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, VOCABULARY, bias=True, dtype=torch.float64)


def lora(names: tuple[str, ...] = ("default",), **config: Any) -> Any:
    """A linear layer with adapters of PEFT's that do something."""
    layers = pytest.importorskip("peft.tuners.lora.layer")
    from peft import LoraConfig

    layer: Any = None
    for name in names:
        given = LoraConfig(r=RANK, lora_alpha=5, init_lora_weights=False, **config)
        if layer is None:
            layer = layers.Linear(linear(), name, given, r=RANK, lora_alpha=5)
        else:
            layer.update_layer(name, RANK, lora_alpha=5, config=given)
    layer.set_adapter(list(names))
    layer.base_layer.requires_grad_(False)
    return layer.double()


def tokens() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    return hidden, torch.randint(VOCABULARY, (2, TOKENS))


def check(head: nn.Module) -> None:
    """The loss and the gradients of the head's own logits."""
    hidden, labels = tokens()
    logits = head(hidden)[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    exact = torch.autograd.grad(expected, leaves, allow_unused=True)
    for backward in ("auto", "recompute", "probs"):
        loss = CCEPipelineLoss(head, backward=backward)(hidden, labels)
        assert relative_error(loss, expected) < 1e-12
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        for ours, want in zip(found, exact, strict=True):
            assert (ours is None) == (want is None)
            assert ours is None or relative_error(ours, want) < 1e-10


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.flip(0)


def test_known_heads() -> None:
    check(linear())
    parametrized = linear()
    parametrize.register_parametrization(parametrized, "weight", Symmetric())
    check(parametrized)
    check(torch.compile(linear(), backend="eager"))
    said: Any = nn.Module()
    said.weight, said.logits_are_linear = nn.Parameter(linear().weight.detach()), True
    hidden, labels = tokens()
    plain = linear()
    plain.bias = None
    expected = CCEPipelineLoss(plain)(hidden, labels)
    assert torch.equal(CCEPipelineLoss(said)(hidden, labels), expected)


def test_adapters_of_peft() -> None:
    """LoRA on the classifier: one adapter and two, switched off, merged, and under dropout."""
    check(lora())
    check(lora(("first", "second")))
    off = lora()
    off.enable_adapters(False)
    off.base_layer.requires_grad_(True)
    check(off)
    merged = lora()
    merged.merge()
    merged.base_layer.requires_grad_(True)
    check(merged)
    dropping = lora(lora_dropout=0.5)
    dropping.eval()
    check(dropping)
    dropping.train()
    hidden, labels = tokens()
    losses = []
    for run in (lambda: CCEPipelineLoss(dropping)(hidden, labels), lambda: dropping(hidden)):
        torch.manual_seed(2)
        losses.append(run())
    expected = F.cross_entropy(losses[1][:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert relative_error(losses[0], expected) < 1e-12


def test_a_copy_that_peft_trains() -> None:
    """``modules_to_save``: the copy is trained and read, not the original."""
    other = pytest.importorskip("peft.utils.other")
    original = linear()
    wrapper = other.ModulesToSaveWrapper(original, "default")
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(1.5)
    wrapper.set_adapter("default")
    check(wrapper)


def test_an_adapter_is_not_rounded_away() -> None:
    """What an adapter of 1e-3 of its rows does counts in bfloat16; merged, most of it is gone."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(1, 200, 64).bfloat16(), torch.randint(500, (1, 200))
    w, a = (torch.randn(rows, 64).div(8).bfloat16() for rows in (500, 4))
    b = torch.randn(500, 4).mul(1e-3).bfloat16()

    def effect(weight: Tensor, adapters: tuple[LowRank, ...] = ()) -> Tensor:
        """The difference that adapters, or other rows, make to each token's loss."""
        operands = (Rows(w, None, None).operands(hidden), Rows(weight, None, None, adapters))
        before, after = operands[0], operands[1].operands(hidden)
        losses = [
            linear_cross_entropy(*pair, labels, reduction="none").double()
            for pair in (after, before)
        ]
        return losses[0] - losses[1]

    wide = [
        F.linear(hidden.double(), rows)
        for rows in (w.double() + (b.double() @ a.double()), w.double())
    ]
    after, before = (F.cross_entropy(z[0], labels[0], reduction="none") for z in wide)
    exact = (after - before).unsqueeze(0)
    assert relative_error(effect(w, (LowRank(a, b, 1.0),)), exact) < 0.02
    assert relative_error(effect(torch.addmm(w, b, a)), exact) > 0.2


def test_refused_heads() -> None:
    """Whatever may be more than a weight ends before a step, and says what to do."""
    hooked, replaced, normed = linear(), linear(), linear()
    hooked.register_forward_hook(lambda module, inputs, output: 2.0 * output)
    replaced.forward = lambda hidden: 2.0 * F.linear(hidden, replaced.weight)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(normed)
    for head, message in (
        (Scaled(HIDDEN, VOCABULARY), "Scaled that has a forward of its own"),
        (replaced, "Linear that has a forward of its own"),
        (hooked, "Linear that has forward hooks"),
        (normed, "Linear that has forward hooks"),
        (nn.Sequential(linear()), "a tensor or a module with a weight, got Sequential"),
        (lora(lora_bias=True), "'default' has a bias"),
        (lora(use_dora=True), "'default' is a DoraLinearVariant"),
    ):
        with pytest.raises(ValueError, match=message):
            CCEPipelineLoss(head)
    CCEPipelineLoss(hooked.weight, hooked.bias)  # whoever names the weight means the weight
    late = linear()
    loss = CCEPipelineLoss(late)
    late.register_forward_hook(lambda module, inputs, output: 2.0 * output)
    with pytest.raises(ValueError, match="has forward hooks"):
        loss(*tokens())


def test_options_are_known_before_a_step() -> None:
    head = linear()
    for options, message in (
        (
            {"lable_smoothing": 0.1},
            "unknown option 'lable_smoothing', did you mean 'label_smoothing'",
        ),
        ({"return_lse": True}, "return_lse is not an option of a CCEPipelineLoss"),
        ({"impl": "fast"}, "unknown impl 'fast'"),
        ({"z_loss": -1.0}, "z_loss must be a number of at least 0"),
        ({"hidden_layout": "split"}, "unknown hidden_layout 'split'"),
        ({"microbatches_in_flight": 0}, "microbatches_in_flight must be a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            CCEPipelineLoss(head, **options)
    loss = CCEPipelineLoss(head)
    assert torch.equal(copy.deepcopy(loss)(*tokens()), loss(*tokens()))


def check_sharded_adapter() -> None:
    """A pipeline over sharded rows W and B, A whole: losses and every gradient of one process."""
    groups = build_stage_groups(2, 2, device_type="cpu")
    for schedule in ("1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"):
        for layout, rows in (("replicated", None), ("sharded", (19, 4)), ("sequence", (0, 23))):
            setting = Setting(schedule, layout=layout, vocabulary=23, adapter=True, rows=rows)
            batch = draw_batch(setting, groups.vocab_degree if layout == "sharded" else 1, 1)
            losses, expected = one_process(setting, [batch])
            pipeline = Pipeline(setting, groups, torch.device("cpu"))
            found = pipeline.step(*batch)
            for ours, want in zip(found, losses[0] if pipeline.has_last else [], strict=True):
                assert relative_error(ours, want, 1.0) < 1e-12, setting
            errors = pipeline.compare_gradients(expected)
            assert max(errors.values()) < 1e-11, (setting, errors)
            if pipeline.head is not None:  # for generation: whole logits, adapter and all
                assert isinstance(pipeline.head, VocabParallelClassifier)
                hidden = torch.randn(3, pipeline.head.hidden_size, dtype=torch.float64)
                torch.distributed.broadcast(
                    hidden, groups.mesh["vocab"].mesh[0].item(), group=groups.vocab_group
                )
                pipeline.head.pipeline_mode = False
                whole = expected["head"](hidden)
                assert relative_error(pipeline.head(hidden), whole) < 1e-12


def test_sharded_adapter() -> None:
    pytest.importorskip("peft")
    run_ranks(check_sharded_adapter, 4)


def test_several_adapters_are_not_sharded() -> None:
    with pytest.raises(ValueError, match="expected one adapter of the classifier to shard, got 2"):
        VocabParallelClassifier.from_linear(lora(("first", "second")), None)
