"""Which moments of a video an answer rests on, and how they are shown."""
