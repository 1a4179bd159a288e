"""What tests borrow from each other: problems, error budgets, the simulator of a GPU."""
