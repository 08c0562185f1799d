"""What fits: sizes, calls and budgets, worked out before anything is allocated."""
