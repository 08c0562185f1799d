"""The moments of a video that an answer attended to: how they are found, drawn and saved."""
