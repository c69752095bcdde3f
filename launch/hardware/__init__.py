"""Hardware files of the planner: JSON, each number with its source."""
