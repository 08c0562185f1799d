"""The demo: a long video, a small cap, and the answers beside those of a full cache."""
