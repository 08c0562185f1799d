"""From a video file to visual tokens: decoding and sampling by time, and the vision tower run in segments."""
