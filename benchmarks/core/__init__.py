"""How a block is timed: layers, the ways to run one, the machine's limits, results."""
