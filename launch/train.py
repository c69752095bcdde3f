"""Train a model on a data x pipeline x vocab mesh: ``torchrun ... -m launch.train --help``.

What reads the command line; `launch/training.py` trains.
"""

from launch.arguments import TrainArguments
from launch.command import one_sentence, read_command

PROGRAM = "launch.train"


def main() -> None:
    """Read the command line and train."""
    with one_sentence(PROGRAM):
        arguments = read_command(PROGRAM, TrainArguments)
        from launch.training import start  # after --help, which need not wait for torch

        start(arguments)


if __name__ == "__main__":
    main()
