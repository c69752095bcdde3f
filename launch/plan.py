"""Which mesh for how many GPUs: ``python -m launch.plan --model qwen3-32b --gpus 64``.

The planner is `launch.planning`; here is what starts it, and the process group that it measures.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from launch.options import parse
from launch.planning.arguments import PlanArguments


def main() -> None:
    """Parse the command line and plan; a user's mistake ends with a message and code 2."""
    try:
        arguments = parse(PlanArguments, "launch.plan")
    except ValueError as error:
        print(f"launch.plan: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.calibrate:
        _calibrate(arguments.out)
    else:
        from launch.planning.command import run  # after --help, which need not wait for torch
        from launch.start_command import start_command

        run(arguments, start_command)


def _calibrate(path: Path) -> None:
    """Write the hardware file of this rank's device; of several ranks, the first one's."""
    import torch

    from launch.planning.calibrate import calibrate
    from launch.runtime import process_group

    if "RANK" in os.environ:
        with process_group(timeout=60.0) as device:
            found, writes = calibrate(device), os.environ["RANK"] == "0"
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found, writes = calibrate(device), True
    if writes:
        found.save(path)
        print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
