"""What lies around the package: torch's modes and threads, forks, names that transformers has changed."""
