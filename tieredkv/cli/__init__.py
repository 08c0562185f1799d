"""The command line: answers on stdout, everything else on stderr; exit code 0, 1 (something failed) or 2 (bad input).

One file per command; `app` joins them. A module that is slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point: one command, then the end of the process. Imports nothing before it handles interrupts."""
    try:
        from tieredkv.cli import process

        with process.quick_imports():
            from tieredkv.cli.app import execute
        try:
            execute()
        finally:
            process.leave()
    except KeyboardInterrupt:
        print("tieredkv: interrupted.", file=sys.stderr)
        sys.exit(130)
