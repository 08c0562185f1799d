"""The demo: a long video, a small cap, and the answers compared with those of a full cache."""
