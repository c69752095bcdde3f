"""What a run says before its first step, and where it left things after its last."""

import sys
from pathlib import Path

import torch
from transformers import PretrainedConfig

from launch.arguments import TrainArguments
from launch.checkpoint import History, complete_checkpoints
from launch.data.batches import Batches
from launch.defaults import OF_SIZE
from launch.whole import model_without_memory


def count_parameters(config: PretrainedConfig) -> int:
    """Count a model's parameters, a tied one once; it is built without memory."""
    model = model_without_memory(config, torch.float32)
    return sum(parameter.numel() for parameter in model.parameters())


def device_name(device: torch.device) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def model_name(arguments: TrainArguments, config: PretrainedConfig) -> str:
    """Return what a model is called, in a word or two."""
    if arguments.model is None:
        return f"{config.model_type} of {arguments.layers} layers"
    return Path(arguments.model).resolve().name


def say_opening(
    given: TrainArguments,
    arguments: TrainArguments,
    config: PretrainedConfig,
    batches: Batches,
    device: torch.device,
) -> None:
    """Say what will be done, in one block on stderr; one rank calls it.

    Args:
        given: the command line's options.
        arguments: the same, with what was chosen for those that were left out.
        config: of the model.
        batches: of the run.
        device: this rank's, of which all ranks are taken to be.
    """
    lines = {
        "model": _model(arguments, config),
        "mesh": _mesh(arguments, device),
        "text": _text(arguments, batches),
        "optimizer": _optimizer(given, arguments),
        "folders": _folders(arguments),
    }
    block = [f"  {name:<10} {words}" for name, words in lines.items()]
    print("\n".join(["launch.train", *block]), file=sys.stderr, flush=True)


def say_resumed(arguments: TrainArguments, history: History) -> None:
    """Say from which step, and from which mesh's checkpoint, a run goes on; one rank calls it."""
    saved = f", which a mesh of {history.mesh} has saved" if history.mesh else ""
    words = f"goes on after step {history.step} of {arguments.steps}{saved}"
    words += f", behind {history.tokens:,} tokens"
    if history.step == 0:
        words = f"--resume: {arguments.checkpoint} has no checkpoint yet, so from the first step on"
    print(f"launch.train: {words}", file=sys.stderr, flush=True)


def left_behind(arguments: TrainArguments, scores: list[tuple[int, float]]) -> list[str]:
    """Return a line for each: the evaluation's last loss, the newest checkpoint, the export."""
    lines = []
    if scores:
        lines.append(f"evaluation's loss {scores[-1][1]:.4f} after step {scores[-1][0]}")
    if arguments.checkpoint is not None:
        lines += [f"checkpoint {path}" for path in complete_checkpoints(arguments.checkpoint)[-1:]]
    if arguments.export is not None and (arguments.export / "config.json").is_file():
        lines.append(f"export {arguments.export}")
    return lines


def _model(arguments: TrainArguments, config: PretrainedConfig) -> str:
    copies = ", float32 copies" if arguments.dtype == "bfloat16" else ""
    return (
        f"{model_name(arguments, config)}, {count_parameters(config):,} parameters, "
        f"{arguments.dtype}{copies if arguments.float32_weights else ''}"
    )


def _mesh(arguments: TrainArguments, device: torch.device) -> str:
    place = "the last stage" if arguments.vocab_over == "last-stage" else "all stages"
    sharded = ", body sharded over the data axis" if arguments.shard_body else ""
    return (
        f"{arguments.mesh} on {arguments.world} x {device_name(device)}, "
        f"{arguments.schedule}, vocabulary on {place}{sharded}"
    )


def _text(arguments: TrainArguments, batches: Batches) -> str:
    name = "the standard library" if arguments.text is None else str(arguments.text)
    of_step = arguments.batch * arguments.sequence
    wanted = arguments.steps * of_step
    tokens, order = len(batches.tokens), "shuffled" if arguments.shuffle else "in their order"
    epochs = wanted / (batches.sequences * arguments.sequence)
    read = f"{tokens:,} tokens, {order}; {wanted:,} in {arguments.steps:,} steps"
    step = f"{arguments.batch} x {arguments.sequence} = {of_step:,} a step"
    return f"{name}: {read}, {epochs:.3g} epochs; {step}"


def _optimizer(given: TrainArguments, arguments: TrainArguments) -> str:
    clip = arguments.clip_norm
    chosen = [f"--{name.replace('_', '-')}" for name in OF_SIZE if getattr(given, name) is None]
    by_size = arguments.model is not None and Path(arguments.model).is_dir() and chosen
    return (
        f"AdamW, learning rate {arguments.learning_rate:g}, {arguments.learning_rate_schedule}, "
        f"{arguments.warmup} steps of warm-up, weight decay {arguments.weight_decay:g}, "
        f"{'no clipping' if clip is None else f'gradient norm clipped to {clip:g}'}"
        + (f"; chosen by the model's size: {', '.join(chosen)}" if by_size else "")
    )


def _folders(arguments: TrainArguments) -> str:
    found = [f"--{option[2:]} {folder}" for option, folder in arguments.written_folders.items()]
    if arguments.export is not None:
        found = [f for f in found if not f.startswith("--export")] + [
            f"--export {arguments.export}"
        ]
    if arguments.checkpoint is not None:
        found.append(f"--checkpoint {arguments.checkpoint}")
    return ", ".join(found)
