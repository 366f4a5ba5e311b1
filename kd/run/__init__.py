"""How a run starts, stops and ends: exit codes, signals, the record of a run, atomic files."""
