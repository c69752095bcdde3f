"""A model of transformers changed in place, beside itself unchanged, in one process."""

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from tests.oracle import relative_error
from tests.test_adapters import tiny
from tests.test_causal_families import tiny_model
from vocab_parallel import remove_vocab_parallel_loss, use_vocab_parallel_loss
from vocab_parallel.deferred_logits import DeferredLogits

# PEFT asks the model what is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def batch_of(rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(97, (rows, length))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, 5:], mask[0, 8:] = -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(call: Callable[..., Any], model: nn.Module, batch: Any) -> list[Tensor]:
    torch.manual_seed(1)  # of dropout
    loss = call(**batch).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [loss, *(grad for grad in found if grad is not None)]


def norm(gradients: list[Tensor]) -> Tensor:
    return torch.stack([gradient.double().norm() for gradient in gradients]).norm()


def check_as_stock(model: nn.Module, batch: Any, call: Callable[..., Any] | None = None) -> None:
    """Loss, gradient norm and gradients of the model before and after it is changed, and undone."""
    call = call or model
    stock = loss_and_gradients(call, model, batch)
    use_vocab_parallel_loss(model)
    output = call(**batch)
    assert output.logits is None
    found = loss_and_gradients(call, model, batch)
    assert relative_error(found[0], stock[0]) < 1e-6
    assert relative_error(norm(found[1:]), norm(stock[1:])) < 1e-6
    differences = [ours - want for ours, want in zip(found[1:], stock[1:], strict=True)]
    assert norm(differences) < 1e-5 * norm(stock[1:])
    remove_vocab_parallel_loss(model)
    assert isinstance(call(**batch).logits, Tensor)
    again = loss_and_gradients(call, model, batch)
    assert all(torch.equal(ours, want) for ours, want in zip(again, stock, strict=True))


@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": 50}, {"return_dict": True}])
@pytest.mark.parametrize(
    ("model_type", "given"),
    [
        ("qwen3", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("gemma2", {"final_logit_softcapping": 0.1}),
    ],
)
def test_plain(model_type: str, given: dict[str, Any], more: dict[str, Any]) -> None:
    check_as_stock(tiny(model_type, **given), {**batch_of(), **more})


def test_what_the_models_loss_is_given() -> None:
    """Another ignore_index, shifted labels, a count as a tensor, positional labels, a tuple."""
    model, batch = tiny("llama"), batch_of()
    check_as_stock(model, {**batch, "labels": batch["input_ids"], "ignore_index": 7})
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    check_as_stock(model, {**batch, "shift_labels": shifted})
    check_as_stock(model, {**batch, "num_items_in_batch": torch.tensor(31)})
    ids, labels = batch["input_ids"], batch["labels"]
    expected = model(ids, None, None, None, None, labels, return_dict=False)
    use_vocab_parallel_loss(model)
    found = model(ids, None, None, None, None, labels, return_dict=False)
    assert relative_error(found[0], expected[0]) < 1e-6
    assert found[1] is None
    assert len(found) == len(expected)


def halves(module: nn.Module, args: Any, output: Any) -> Tensor:
    return output / 2


def test_hooks_and_patches() -> None:
    """A pre-hook, a hook within the body, a forward that was patched, one that is patched later."""
    model, batch = tiny("llama"), batch_of()
    plain = model(**batch).loss
    handles = [
        model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "input_ids": kwargs["input_ids"].flip(0)}),
            with_kwargs=True,
        ),
        model.model.norm.register_forward_hook(halves),
    ]
    assert relative_error(model(**batch).loss, plain) > 1e-3
    check_as_stock(model, batch)
    for handle in handles:
        handle.remove()
    inner = model.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        output.loss = output.loss * 3
        return output

    model.forward = patched
    check_as_stock(model, batch)
    assert model.forward is patched
    del model.forward
    use_vocab_parallel_loss(model)
    inner = model.forward
    model.forward = patched  # later: undone beneath it
    assert relative_error(model(**batch).loss, 3 * plain) < 1e-6
    remove_vocab_parallel_loss(model)
    assert isinstance(model(**batch).logits, Tensor)


class WithPenalty(LlamaForCausalLM):
    """A forward of its own around that of its class."""

    def forward(self, *args: Any, scale: float = 2.0, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = scale * output.loss + self.model.norm.weight.square().mean()
        return output


def test_a_subclass() -> None:
    model = WithPenalty(tiny("llama").config)
    check_as_stock(model, batch_of())
    check_as_stock(model, {**batch_of(), "scale": 3.0})


def test_peft() -> None:
    """Prompts, adapters on body and head, two at once: gradients of all that is trained."""
    peft = pytest.importorskip("peft")
    causal = {"task_type": "CAUSAL_LM"}
    lora = {**causal, "init_lora_weights": False, "r": 4}
    for config in (
        peft.PromptTuningConfig(**causal, num_virtual_tokens=5),
        peft.PrefixTuningConfig(**causal, num_virtual_tokens=5),
        peft.PromptEncoderConfig(**causal, num_virtual_tokens=5, encoder_hidden_size=8),
        peft.LoraConfig(**lora, target_modules=["q_proj"]),
        peft.LoraConfig(**lora, target_modules=["q_proj", "lm_head"]),
        peft.LoraConfig(**lora, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.IA3Config(**causal, target_modules=["k_proj"], feedforward_modules=[]),
    ):
        model = peft.get_peft_model(tiny("llama", tie_word_embeddings=False), config)
        check_as_stock(model, batch_of())
    model = peft.get_peft_model(
        tiny("llama", tie_word_embeddings=False),
        peft.LoraConfig(**lora, target_modules=["q_proj"]),
    )
    model.add_adapter("other", peft.LoraConfig(**lora, target_modules=["v_proj"]))
    model.eval()
    check_as_stock(model, {**batch_of(), "adapter_names": ["default", "other", "__base__"]})
    before = tiny("llama", tie_word_embeddings=False)
    use_vocab_parallel_loss(before)  # and wrapped later
    wrapped = peft.get_peft_model(before, peft.LoraConfig(**lora, target_modules=["q_proj"]))
    batch = batch_of()
    found = loss_and_gradients(wrapped, wrapped, batch)
    remove_vocab_parallel_loss(wrapped)
    stock = loss_and_gradients(wrapped, wrapped, batch)
    assert relative_error(found[0], stock[0]) < 1e-6
    assert relative_error(norm(found[1:]), norm(stock[1:])) < 1e-6


def test_gradient_checkpointing() -> None:
    model = tiny("llama").train()
    model.activation_checkpointing_enable()
    check_as_stock(model, batch_of())


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled() -> None:
    """The whole model, which is changed after, and the body alone, before."""
    batch = batch_of()
    for whole in (True, False):
        torch.compiler.reset()
        model = tiny("llama")
        expected = loss_and_gradients(model, model, batch)
        called: Any = model
        counter = CompileCounter()
        if whole:
            called = torch.compile(model, backend=counter)
            use_vocab_parallel_loss(called)
        else:
            use_vocab_parallel_loss(model)
            model.model = torch.compile(model.model, backend=counter)
        found = loss_and_gradients(called, model, batch)
        graphs = counter.frame_count
        assert called(**batch).logits is None
        assert counter.frame_count == graphs > 0, "a second call compiles nothing"
        assert relative_error(found[0], expected[0]) < 1e-6
        assert relative_error(norm(found[1:]), norm(expected[1:])) < 1e-6


def test_without_labels() -> None:
    """Logits, generation and gradients are bitwise the model's own."""
    model, ids = tiny("llama"), batch_of()["input_ids"]
    expected = model(ids).logits
    words = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    use_vocab_parallel_loss(model)
    assert torch.equal(model(ids).logits, expected)
    assert type(model(ids).logits) is Tensor
    found = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(found, words)


def test_logits_on_request() -> None:
    """In evaluation: computed when they are read, as the model scales and caps them."""
    for number, family in enumerate(("llama", "gemma2", "cohere", "granite")):
        model, batch = tiny_model(family), batch_of()
        with (torch.no_grad, torch.inference_mode)[number % 2]():
            expected = model(**batch)
            use_vocab_parallel_loss(model)
            output = model(**batch)
        logits = output.logits
        assert isinstance(logits, DeferredLogits)
        assert logits.shape == expected.logits.shape
        assert logits._real is None, "nothing was computed yet"
        assert relative_error(output.loss, expected.loss) < 1e-6
        assert relative_error(logits[..., :-1, :], expected.logits[..., :-1, :]) < 1e-6
        assert torch.equal(logits.argmax(-1), expected.logits.argmax(-1))
        assert not (logits + 0).requires_grad, "read where gradients are taken"
        assert logits.float() is not logits
        found = pickle.loads(pickle.dumps(logits))
        assert relative_error(found, expected.logits) < 1e-6
        logits[..., 0] = -1e9
        assert (logits.argmax(-1) != 0).all(), "what is written stays"


def test_copies_and_pickles() -> None:
    """A copy is changed as its original is, computes with its own weights, and is undone alone."""
    model, batch = tiny("llama", tie_word_embeddings=False), batch_of()
    use_vocab_parallel_loss(model, z_loss=0.1)
    expected = model(**batch).loss
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert other(**batch).logits is None
        assert relative_error(other(**batch).loss, expected) == 0.0
        with torch.no_grad():
            other.lm_head.weight.mul_(2)
        assert relative_error(other(**batch).loss, expected) > 1e-3
        assert relative_error(model(**batch).loss, expected) == 0.0
        remove_vocab_parallel_loss(other)
        assert isinstance(other(**batch).logits, Tensor)
        assert model(**batch).logits is None


def test_options() -> None:
    """They are of linear_cross_entropy; another call changes them, and does not change twice."""
    model, batch = tiny("llama"), batch_of()
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.2)
    plain = F.cross_entropy(logits, labels)
    use_vocab_parallel_loss(model, label_smoothing=0.2, backward="probs")
    assert relative_error(model(**batch).loss, smoothed) < 1e-6
    use_vocab_parallel_loss(model, memory_budget=1 << 20)
    assert relative_error(model(**batch).loss, plain) < 1e-6
    remove_vocab_parallel_loss(model)
    remove_vocab_parallel_loss(model)  # a second time is no mistake
    assert "forward" not in vars(model)
    for name in ("shift", "softcap", "return_lse", "hidden_layout"):
        with pytest.raises(ValueError, match=f"leaves open, got {name}: what the model says"):
            use_vocab_parallel_loss(model, **{name: 1})
    use_vocab_parallel_loss(model, label_smothing=0.1)
    with pytest.raises(ValueError, match="label_smothing"):
        model(**batch)
    assert isinstance(model.lm_head, nn.Linear), "a mistake leaves the classifier in its place"


def entropy_loss(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return logits.log_softmax(-1).sum()


def test_refused() -> None:
    """No causal model, another loss, a classifier that is more than its weight."""
    batch = batch_of()
    with pytest.raises(ValueError, match=r"expected a causal language model .* got Linear"):
        use_vocab_parallel_loss(nn.Linear(2, 2))
    model = tiny("llama", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="got LlamaModel"):
        use_vocab_parallel_loss(model.model)
    use_vocab_parallel_loss(model)
    model.loss_function = entropy_loss
    with pytest.raises(ValueError, match="that calls log_softmax on them: its loss is more"):
        model(**batch)
    model = tiny("llama", tie_word_embeddings=False)
    use_vocab_parallel_loss(model)
    model.lm_head.register_forward_hook(halves)
    with pytest.raises(ValueError, match="that has forward hooks, so that its logits may be more"):
        model(**batch)
    with pytest.raises(ValueError, match="that has forward hooks"):
        use_vocab_parallel_loss(model)
    model = tiny("llama", tie_word_embeddings=False)
    use_vocab_parallel_loss(model)
    model.model.forward = lambda **_: None  # a forward without a classifier's call
    model.forward.inner = lambda **_: F.cross_entropy(torch.zeros(1, 2), torch.zeros(1).long())
    with pytest.raises(ValueError, match="expected a model that calls its classifier"):
        model(**batch)


class Ids(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences, each its own labels, of which some are ignored."""

    def __init__(self, rows: int = 16) -> None:
        self.ids = torch.randint(97, (rows, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.ids[index].clone()
        labels[: index % 7] = -100
        return {"input_ids": self.ids[index], "labels": labels}


def trained(
    model: nn.Module, folder: Path, resume: bool = False, more: Any = None, **given: Any
) -> tuple[list[dict[str, float]], nn.Module]:
    """Train and evaluate; return what Trainer logged."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 5, "use_cpu": True, "report_to": [], "seed": 0,
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 3e-3,
    }  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**arguments, **given}),
        train_dataset=Ids(),
        eval_dataset=Ids(7),
        **(more or {}),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=resume or None)
        trainer.evaluate()
    kept = ("loss", "grad_norm", "eval_loss", "eval_sum", "eval_first")
    logged = [{k: v for k, v in entry.items() if k in kept} for entry in trainer.state.log_history]
    return [entry for entry in logged if entry], trainer.model


def compare(ours: list[dict[str, float]], stock: list[dict[str, float]], rel: float) -> None:
    assert len(ours) == len(stock) > 1
    for found, expected in zip(ours, stock, strict=True):
        assert found == pytest.approx(expected, rel=rel)


def compare_rounded(
    ours: list[dict[str, float]], stock: list[dict[str, float]], exact: list[dict[str, float]]
) -> None:
    """Runs in bfloat16: ours is as far from one in float32 as stock is, but for chance."""

    def farthest(run: list[dict[str, float]], names: tuple[str, ...]) -> float:
        pairs = [
            (own[name], want[name])
            for own, want in zip(run, exact, strict=True)
            for name in names
            if name in want
        ]
        return max(abs(own / want - 1) for own, want in pairs)

    for names in (("loss", "eval_loss"), ("grad_norm",)):
        assert 0 < farthest(ours, names) < 3 * farthest(stock, names), names


def metrics(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions
    return {"sum": float(abs(logits).sum()), "first": float(logits[..., 0].argmax())}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "metrics of logits": {"more": {"compute_metrics": metrics}},
}


@pytest.mark.filterwarnings("ignore")  # of Trainer's and accelerate's own
@pytest.mark.parametrize("case", CASES)
def test_trainer(case: str, tmp_path: Path) -> None:
    """Losses, gradient norms and an evaluation, each step beside those of the model unchanged."""
    runs = []
    for changed in (True, False):
        model = tiny("llama", tie_word_embeddings=False)
        if changed:
            use_vocab_parallel_loss(model)
        runs.append(trained(model, tmp_path, **CASES[case])[0])
    compare(*runs, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_trainer_smoothed_without_logits(tmp_path: Path) -> None:
    """Our label_smoothing is Trainer's label_smoothing_factor, and computes no logits."""
    model = tiny("llama", tie_word_embeddings=False)
    stock = trained(copy.deepcopy(model), tmp_path, label_smoothing_factor=0.1)[0]
    use_vocab_parallel_loss(model, label_smoothing=0.1)
    compare(trained(model, tmp_path)[0], stock, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_trainer_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    causal = {"task_type": "CAUSAL_LM"}
    for config in (
        peft.LoraConfig(**causal, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        peft.PromptTuningConfig(**causal, num_virtual_tokens=3),
    ):
        runs = []
        for changed in (True, False):
            torch.manual_seed(0)
            model = peft.get_peft_model(tiny("llama", tie_word_embeddings=False), config)
            if changed:
                use_vocab_parallel_loss(model)
            runs.append(trained(model, tmp_path, gradient_accumulation_steps=2)[0])
        compare(*runs, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_trainer_resumes(tmp_path: Path) -> None:
    """From a checkpoint of a changed model's, bitwise as if it had not stopped."""
    logs = []
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for index, end in enumerate(steps):
            model = tiny("llama", tie_word_embeddings=False)
            use_vocab_parallel_loss(model)
            logged, model = trained(
                model, tmp_path / name, resume=index > 0, max_steps=end, save_strategy="steps",
                save_steps=2, lr_scheduler_type="constant",
            )  # fmt: skip
        logs.append((logged, model))
    assert logs[0][0] == logs[1][0]
    folder = tmp_path / "saved"
    logs[0][1].save_pretrained(folder)
    again: Any = LlamaForCausalLM.from_pretrained(folder)
    batch = batch_of()
    assert relative_error(again(**batch).loss, logs[0][1](**batch).loss) < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_trainer_bf16(tmp_path: Path) -> None:
    """As far from float32 as the model unchanged is: layers and products run in bfloat16."""
    runs: dict[tuple[bool, bool], list[dict[str, float]]] = {}
    for changed in (True, False):
        for bf16 in (True, False):
            model = tiny("llama", tie_word_embeddings=False)
            if changed:
                use_vocab_parallel_loss(model)
            runs[changed, bf16] = trained(model, tmp_path, bf16=bf16, max_steps=3)[0]
    compare_rounded(runs[True, True], runs[False, True], runs[False, False])
    assert runs[True, True] != runs[True, False]


@contextlib.contextmanager
def an_accelerator(**given: Any) -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, **given)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [True, False])
def test_accelerate_bf16(first: bool) -> None:
    """Changed before or after accelerate has wrapped the forward, and unwrapped after."""
    batch = batch_of()
    losses = []
    for changed in (True, False):
        model = tiny("llama", tie_word_embeddings=False)
        with an_accelerator(mixed_precision="bf16") as accelerator:
            if changed and first:
                use_vocab_parallel_loss(model)
            prepared = accelerator.prepare(model)
            if changed and not first:
                use_vocab_parallel_loss(prepared)
            losses.append(loss_and_gradients(prepared, model, batch))
            with torch.no_grad():
                assert prepared(**batch).logits.dtype == torch.float32
            bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
            losses.append(loss_and_gradients(bare, model, batch))
    assert relative_error(losses[0][0], losses[2][0]) < 1e-3
    assert relative_error(norm(losses[0][1:]), norm(losses[2][1:])) < 1e-2
    if first:  # else accelerate cannot see its own wrapper, which stays
        assert relative_error(losses[1][0], losses[3][0]) < 1e-6
    rounded, exact = (torch.cat([each.flatten() for each in losses[i][1:]]) for i in (0, 3))
    assert relative_error(rounded, exact) > 1e-4, "the layers ran in bfloat16"


def test_rows_that_the_configuration_does_not_say() -> None:
    """A classifier of fewer rows is refused, and one of more is warned of."""
    refused = pytest.raises(
        ValueError, match=r"has 60 rows, .* LlamaForCausalLM says vocab_size=97"
    )
    warned = pytest.warns(UserWarning, match=r"takes 128 rows .*from_vocab\(97, group, num_rows=12")
    for rows, expected in ((60, refused), (128, warned)):
        model = tiny("llama", tie_word_embeddings=False)
        model.lm_head = nn.Linear(32, rows, bias=False)
        with expected:
            use_vocab_parallel_loss(model)
