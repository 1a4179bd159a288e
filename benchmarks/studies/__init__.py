"""Studies of one question each: rounding errors, the cost of small calls, machine code, the planners' constants."""
