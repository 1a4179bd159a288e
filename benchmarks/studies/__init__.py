"""Single questions: rounding errors, the cost of small calls, machine code, the planners' constants."""
