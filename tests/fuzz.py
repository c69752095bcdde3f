"""Fresh drawn combinations of options on real ranks: ``python -m tests.fuzz [EXAMPLES] [SEED]``."""

import sys
import time

from tests.ranks import run_ranks
from tests.test_loss_ranks import check_drawn_cases

DEGREES = (1, 2, 3, 4)


def main() -> None:
    examples = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    for degree in DEGREES:
        share = -(-examples // len(DEGREES))
        print(f"{share} combinations on {degree} ranks, seed {seed}", flush=True)
        run_ranks(
            check_drawn_cases, degree, timeout=3600, degree=degree, examples=share, seed_value=seed
        )
    print(f"{share * len(DEGREES)} combinations passed")


if __name__ == "__main__":
    main()
