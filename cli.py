"""`python cli.py` from a checkout; the command itself is compress/cli.py."""

from compress.cli import main

main()
