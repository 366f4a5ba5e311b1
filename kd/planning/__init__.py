"""The planner: memory, time and disk space of a run, computed before a model is loaded."""
