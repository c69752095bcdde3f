"""The options of ``launch.train`` and ``launch.evaluate``: dataclasses that make command lines.

Nothing here imports torch or transformers: ``--help`` answers at once.
"""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

from launch.data.sources import find_source
from launch.planning.nearest import nearest_path
from launch.planning.published import find_model
from launch.planning.schedules import SCHEDULES

_LONGEST = 1e9  # seconds, of some thirty years, that a timedelta takes
_NAMED = tyro.extras.literal_type_from_choices([one.name for one in SCHEDULES.values()])


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """What is read, and how it becomes tokens."""

    text: Annotated[Path | None, tyro.conf.arg(metavar="FILE_OR_FOLDER")] = None
    """Text, .jsonl or .json, .parquet, a folder of one of these or saved by `datasets`, or token
    ids as .npy; by default the Python standard library's own sources."""
    text_field: str = "text"
    """Column of a data set that has the text, or a conversation; without such a column a
    conversation is looked for in "messages"."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the tokenizer; by default the --model folder's own, and without a --model folder
    the vocabulary of Qwen2.5 and Qwen3."""
    packed: Literal["auto", "yes", "no"] = "auto"
    """Whether documents that share a sequence neither attend to nor predict one another; auto is
    yes for the entries of a data set, and no for plain text, which is one stream."""
    chat_labels: Literal["assistant", "all"] = "assistant"
    """Which tokens of a conversation count in the loss: the assistant's, as the chat template
    marks them, or all."""
    cache: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/tokens")
    """Folder for the text's tokens, in memory-mapped files that the first run makes and the next
    one finds; all ranks of a machine see it."""

    def validate_paths(self) -> None:
        """Raise ValueError for a file or folder that is not there, or is of no known kind."""
        find_source(self.text)
        if self.tokenizer is not None and not self.tokenizer.is_dir():
            near = nearest_path(self.tokenizer)
            raise ValueError(
                f"--tokenizer {self.tokenizer} is no folder here"
                f"{'' if near is None else f', did you mean {near}?'}: give one with a tokenizer's "
                f"files, such as tokenizer.json"
            )


@dataclass(frozen=True, kw_only=True)
class MeshArguments:
    """How many ranks there are, and how they share the work."""

    pipeline: int = 2
    """Pipeline degree: over how many ranks the layers are spread."""
    vocab: int = 2
    """Vocab degree: over how many ranks of the last stage the classifier's rows are spread."""
    data: int = 1
    """Data degree: how many copies of the mesh train on sequences of their own."""
    shard_body: bool = False
    """Let each copy hold its part alone of layers, norms and a plain embedding, with gradients and
    optimizer state (FSDP2); weights and gradients are whole while a step runs."""
    vocab_over: Literal["last-stage", "all-stages"] = "last-stage"
    """Which ranks hold the rows of classifier and embedding: with all-stages every rank does."""
    rows: Literal["balanced", "filled"] = "balanced"
    """With all-stages: as many rows on each rank, or more where there are fewer layers."""
    schedule: Annotated[str, tyro.conf.arg(constructor=_NAMED)] = "1F1B"
    """Pipeline schedule of torch.distributed.pipelining; all but the first two run two stages on
    each rank."""
    impl: str = "auto"
    """How a rank computes the loss over its rows: auto, chunked or reference."""
    recompute: Literal["none", "first", "all"] = "none"
    """Which stages' layers keep their input alone and run again in backward; the first stage has
    the most microbatches in flight."""
    loss_memory: int = 64
    """MiB that a rank's loss may hold of logits; with more it computes fewer of them twice."""
    timeout: float = 300.0
    """Seconds after which a rank gives up waiting for another."""


@dataclass(frozen=True, kw_only=True)
class StepsArguments:
    """How long a run is, and how a step is cut."""

    steps: int = 30
    """Optimizer steps."""
    batch: int = 8
    """Sequences of one optimizer step over all columns; a multiple of data x vocab x microbatches x
    accumulate."""
    sequence: int = 128
    """Tokens of one sequence."""
    microbatches: int = 4
    """Into how many microbatches a column cuts its sequences of a schedule's step."""
    accumulate: int = 1
    """Schedule steps whose gradients add up to one optimizer step."""
    seed: int = 0
    """Seed of the model's initial weights, and of the order of the text's sequences."""
    shuffle: bool = True
    """Read the text's sequences in an order that is another one in each epoch; or in their own."""


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """What is trained, and in which numbers."""

    model: str | None = None
    """A Hugging Face folder (config.json and safetensors); where there is no folder of that name,
    a published model with random weights: qwen3-1.7b, qwen3-8b, qwen3-32b, llama-3.1-8b,
    llama-3.1-70b or gemma-2-2b. By default a small Qwen3 of the next three sizes."""
    layers: int = 4
    """Decoder layers, at least as many as stages."""
    hidden: int = 128
    """Hidden size, a multiple of 32 (the size of an attention head)."""
    vocabulary: int = 151_936
    """Rows of the classifier and of the embedding; at least the tokenizer's largest id + 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights, activations and gradients."""
    float32_weights: bool = True
    """With --dtype bfloat16, let AdamW train float32 copies of the weights, with float32 moments;
    without them small updates are lost in rounding."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile the decoder layers with torch.compile; auto is yes on a GPU with triton, but for
    schedules that split the backward."""


@dataclass(frozen=True, kw_only=True)
class OptimizerArguments:
    """How the weights follow the gradients."""

    learning_rate: float | None = None
    """Learning rate of AdamW, the largest where it has a schedule; by default what the size of a
    --model folder suggests, and 3e-3 for random weights."""
    learning_rate_schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] | None = None
    """How the learning rate decays to the last step, as transformers' get_scheduler has it; by
    default cosine for a --model folder, and constant for random weights."""
    warmup: int | None = None
    """Steps in which the learning rate rises from 0; by default 3% of --steps for a --model folder,
    and none for random weights."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW's two averages."""
    weight_decay: float = 0.01
    """Of AdamW, for matrices alone: norms and biases do not decay."""
    clip_norm: float | None = None
    """Clip the norm of the whole model's gradient to this; by default to 1 for a --model folder,
    and not for random weights. inf leaves it alone."""


@dataclass(frozen=True, kw_only=True)
class CheckpointArguments:
    """What a run leaves to go on from, and to use elsewhere."""

    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Save checkpoints here, which load on any mesh; the two newest are kept. A folder that has
    some already is of another run: --resume it."""
    checkpoint_every: int = 0
    """Save after every so many steps; 0 saves after the last one alone."""
    resume: bool = False
    """Go on from the newest checkpoint of --checkpoint, if there is one."""
    new_batch: bool = False
    """Let --resume go on with another --batch, behind the tokens that were read."""
    export: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write a Hugging Face model folder here at the end, with the tokenizer and the --model
    folder's generation config; with --resume and no step left, that alone is done."""
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the exported weights; auto is that of the --model folder, else --dtype."""


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """What a run says of itself."""

    out: Path = Path("runs/train")
    """Folder for the loss curve (loss.png), the numbers (run.json) and a line a step
    (log.jsonl)."""
    tracker: Literal["tensorboard", "wandb"] | None = None
    """Where the lines of log.jsonl in --out go besides."""
    eval_every: int = 0
    """Score --eval-text after every so many steps and after the last one; 0 is never."""
    eval_text: Annotated[Path | None, tyro.conf.arg(metavar="FILE_OR_FOLDER")] = None
    """What is scored: as --text, and no part of it."""
    eval_batches: int = 8
    """Batches of --batch sequences to score."""
    profile: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Trace one step, the fifth or the last, and write a rank-N.json here for each rank, which
    chrome://tracing and Perfetto open."""
    check: bool = False
    """Run the first five steps again in one process, unsharded, and compare: losses to 1e-5,
    the classifier's and every body gradient of step 1 to 1e-4 by relative norm."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments(
    MeshArguments,
    StepsArguments,
    ModelArguments,
    DataArguments,
    OptimizerArguments,
    CheckpointArguments,
    ReportArguments,
):
    """Train a causal language model on text, on a data x pipeline x vocab mesh of ranks.

    Start it with torchrun; the number of ranks is data x pipeline x vocab:

        torchrun --nproc-per-node 4 -m launch.train --pipeline 2 --vocab 2

    The body is data-parallel over the vocab axis: each column of ranks is a pipeline with its
    own sequences. On the last stage the columns share the classifier, of which each holds only
    its rows, and compute one loss together; with --vocab-over all-stages the ranks of all stages
    do, between their own layers.
    """

    @property
    def splits_backward(self) -> bool:
        """Whether the schedule runs the two halves of a backward apart."""
        return SCHEDULES[self.schedule.lower()].splits

    @property
    def world(self) -> int:
        """How many ranks the mesh has."""
        return self.pipeline * self.data * self.vocab

    @property
    def mesh(self) -> str:
        """The mesh in words."""
        return f"data {self.data} x pipeline {self.pipeline} x vocab {self.vocab}"

    @property
    def columns(self) -> int:
        """Over how many pipelines the sequences of a batch are spread."""
        return self.data * self.vocab

    @property
    def written_folders(self) -> dict[str, Path]:
        """Folders that a run writes to, by their options, without that of its checkpoints."""
        parent = None if self.export is None else self.export.parent
        found = {"--export": parent, "--profile": self.profile, "--out": self.out}
        return {option: folder for option, folder in found.items() if folder is not None}

    def validate(self) -> None:
        """Raise ValueError for values that cannot be combined; the same on every rank."""
        mesh, sizes = "pipeline vocab data", "layers hidden vocabulary"
        cut = "steps batch microbatches accumulate loss_memory eval_batches"
        _refuse_below(1, self, f"{mesh} {cut} {sizes}")
        _refuse_below(0, self, "checkpoint_every eval_every learning_rate weight_decay warmup")
        _refuse_no_length(self)
        if self.checkpoint is None and (self.resume or self.checkpoint_every):
            raise ValueError("--resume and --checkpoint-every need --checkpoint FOLDER")
        if self.export is None and self.export_dtype != "auto":
            raise ValueError("--export-dtype needs --export FOLDER")
        if self.check and (self.dtype != "float32" or self.resume):
            raise ValueError("--check compares float32 runs from their first step")
        if self.vocab_over == "all-stages" and not SCHEDULES[self.schedule.lower()].held:
            raise ValueError(
                f"--schedule {self.schedule} cannot let all stages carry the vocabulary: use one "
                f"of {', '.join(one.name for one in SCHEDULES.values() if one.held)}"
            )
        fills = SCHEDULES[self.schedule.lower()].fills and self.vocab_over == "last-stage"
        if fills and self.microbatches < self.pipeline:
            raise ValueError(
                f"--schedule {self.schedule} with the vocabulary on the last stage needs at least "
                f"as many --microbatches as --pipeline {self.pipeline}, got {self.microbatches}"
            )
        whole = ", ".join(one.name for one in SCHEDULES.values() if not one.splits)
        if self.compile == "yes" and self.splits_backward:
            raise ValueError(
                f"--compile yes makes one function of a layer's backward, whose halves --schedule "
                f"{self.schedule} runs apart: use one of {whole}"
            )
        if self.recompute != "none" and self.splits_backward:
            raise ValueError(
                f"--recompute {self.recompute} would run layers in both halves of a backward, "
                f"which --schedule {self.schedule} splits: use one of {whole}"
            )
        if self.shard_body and self.data == 1:
            raise ValueError("--shard-body spreads the body over copies: give --data 2 or more")
        if self.rows == "filled" and self.vocab_over == "last-stage":
            raise ValueError("--rows filled is of --vocab-over all-stages: give that too")
        self._validate_optimizer()
        if (self.eval_text is None) != (self.eval_every == 0):
            raise ValueError("--eval-every N and --eval-text FILE need one another: give both")
        self._validate_model()
        pieces = self.columns * self.microbatches * self.accumulate
        if self.batch % pieces:
            data, copies = ("data x ", f"{self.data} x ") if self.data > 1 else ("", "")
            raise ValueError(
                f"--batch must be a multiple of {data}vocab x microbatches x accumulate = "
                f"{copies}{self.vocab} x {self.microbatches} x {self.accumulate} = {pieces}, got "
                f"{self.batch}"
            )

    def validate_ranks(self, ranks: int) -> None:
        """Raise ValueError where the mesh has another number of ranks than torchrun started."""
        if ranks != self.world:
            data = f" x --data {self.data}" if self.data > 1 else ""
            raise ValueError(
                f"--pipeline {self.pipeline} x --vocab {self.vocab}{data} is a mesh of "
                f"{self.world} ranks, but torchrun started {ranks}: give it --nproc-per-node "
                f"{self.world}, or choose another mesh"
            )

    def validate_paths(self) -> None:
        """See `DataArguments.validate_paths`; the model's folder and --export too."""
        super().validate_paths()
        if self.eval_text is not None:
            find_source(self.eval_text, "--eval-text")
        if self.tracker is not None and not _is_installed(self.tracker):
            raise ValueError(
                f"--tracker {self.tracker} needs the package {self.tracker}: pip install "
                f"{self.tracker}, or leave it out; log.jsonl in --out has the same lines"
            )
        if self.model is not None:
            find_model(self.model)
        for option in ("out", "export", "profile", "checkpoint"):
            folder = getattr(self, option)
            if folder is not None and folder.exists() and not folder.is_dir():
                raise ValueError(f"--{option} {folder} is no folder: give another name")
        if self.export is not None and self.export.exists() and any(self.export.iterdir()):
            raise ValueError(f"--export {self.export} is not empty: give a new folder")

    def _validate_optimizer(self) -> None:
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"--clip-norm must be positive, got {self.clip_norm}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--betas must be in [0, 1), got {self.betas[0]} {self.betas[1]}")
        if self.warmup is not None and self.warmup > self.steps:
            raise ValueError(
                f"--warmup {self.warmup} is more than --steps {self.steps}: the learning rate "
                f"would never be reached"
            )

    def _validate_model(self) -> None:
        if self.model is None:
            if self.hidden % 32:
                raise ValueError(f"--hidden must be a multiple of 32, got {self.hidden}")
            return
        for name in ("layers", "hidden", "vocabulary"):
            if getattr(self, name) != getattr(TrainArguments, name):
                raise ValueError(f"--{name} is given by --model {self.model}: leave it out")


@dataclass(frozen=True)
class EvaluateArguments(DataArguments):
    """Score a model on text, on a pipeline x vocab mesh of ranks, without gradients.

        torchrun --nproc-per-node 2 -m launch.evaluate --model FOLDER --text FILE
        torchrun --nproc-per-node 8 -m launch.evaluate --model FOLDER --text FILE --pipeline 4

    Layers are spread over the pipeline, and each column of ranks has sequences of its own; without
    --pipeline every rank runs the whole body. The logits never exist. The last line of the output
    is one JSON document.
    """

    model: str
    """A Hugging Face folder, or a published model with random weights, as in launch.train."""
    pipeline: int = 1
    """Pipeline degree: over how many ranks the layers are spread."""
    vocab: int | None = None
    """Vocab degree, of which each column of ranks has one; by default ranks / pipeline."""
    vocab_over: Literal["last-stage", "all-stages"] = "last-stage"
    """Which ranks hold the rows of classifier and embedding, as in launch.train."""
    batches: int = 8
    """Batches to score."""
    batch: int = 4
    """Sequences of one batch over all columns; a multiple of their number."""
    sequence: int = 512
    """Tokens of one sequence."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    timeout: float = 300.0
    """Seconds after which a rank gives up waiting for another."""

    def as_trained(self, ranks: int) -> TrainArguments:
        """Return how launch.train has the model on so many ranks."""
        return TrainArguments(
            model=self.model,
            pipeline=self.pipeline,
            vocab=self.vocab or ranks // self.pipeline,
            vocab_over=self.vocab_over,
            microbatches=self.pipeline,  # the least that a schedule takes; none is run
            dtype=self.dtype,
            compile="no",
        )

    def validate(self) -> None:
        """Raise ValueError for values that cannot be; the same on every rank."""
        _refuse_below(1, self, "pipeline vocab batches batch")
        _refuse_no_length(self)

    def validate_ranks(self, ranks: int) -> None:
        """Raise ValueError where the ranks are no such mesh, or cannot share a batch."""
        if ranks % self.pipeline:
            raise ValueError(f"--pipeline {self.pipeline} does not divide the {ranks} ranks")
        meshed = self.as_trained(ranks)
        meshed.validate_ranks(ranks)
        if self.batch % meshed.vocab:
            raise ValueError(
                f"--batch must be a multiple of {meshed.vocab} columns, got {self.batch}"
            )

    def validate_paths(self) -> None:
        """See `DataArguments.validate_paths`; the model's folder too."""
        super().validate_paths()
        find_model(self.model)


def _is_installed(package: str) -> bool:
    """Tell whether it is; a folder of that name here, as trackers leave them, is no package."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _refuse_below(least: int, arguments: TrainArguments | EvaluateArguments, names: str) -> None:
    """Raise ValueError for a number below the least, NaN or infinity; None is none."""
    for name in names.split():
        value = getattr(arguments, name)
        if value is not None and not least <= value < math.inf:
            bound = "finite" if value == math.inf else f"at least {least}"
            raise ValueError(f"--{name.replace('_', '-')} must be {bound}, got {value}")


def _refuse_no_length(arguments: TrainArguments | EvaluateArguments) -> None:
    """Raise ValueError for a sequence without a target, or no time at all."""
    if arguments.sequence < 2:
        raise ValueError(
            f"--sequence must be at least 2, to predict a token, got {arguments.sequence}"
        )
    if not 0 < arguments.timeout <= _LONGEST:
        raise ValueError(
            f"--timeout must be positive seconds, at most {_LONGEST:.0e}, got {arguments.timeout}"
        )
