"""Perplexity and accuracy of a model over a text: ``torchrun ... -m launch.evaluate --help``.

What reads the command line; `launch/evaluation.py` scores.
"""

from launch.arguments import EvaluateArguments
from launch.command import one_sentence, read_command

PROGRAM = "launch.evaluate"


def main() -> None:
    """Read the command line and score."""
    with one_sentence(PROGRAM):
        arguments = read_command(PROGRAM, EvaluateArguments)
        from launch.evaluation import start  # after --help, which need not wait for torch

        start(arguments)


if __name__ == "__main__":
    main()
