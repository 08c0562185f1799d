"""What fits: sizes, and how a cap is spent, before anything is allocated."""
