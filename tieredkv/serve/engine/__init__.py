"""Sessions, and one worker that answers questions to them."""
