"""From a video file, or from arrays, to frames sampled by time."""
