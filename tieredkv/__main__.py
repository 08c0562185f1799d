"""python -m tieredkv: the command line."""

from tieredkv.cli import main

main()
