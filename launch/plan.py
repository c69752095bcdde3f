"""Which mesh for how many GPUs: ``python -m launch.plan --model qwen3-32b --gpus 64``.

The planner is `launch.planning`; here is what starts it, and the process group that it measures.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
import tyro

from launch.planning.calibrate import calibrate
from launch.planning.command import PlanArguments, run
from launch.runtime import process_group


def main() -> None:
    """Parse the command line and plan; a user's mistake ends with a message and code 2."""
    arguments = tyro.cli(PlanArguments)
    if arguments.calibrate:
        _calibrate(arguments.out)
    else:
        run(arguments)


def _calibrate(path: Path) -> None:
    """Write the hardware file of this rank's device; of several ranks, the first one's."""
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
