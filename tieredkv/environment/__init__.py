"""The environment the package runs in: torch's modes and threads, forked processes, releases of transformers."""
