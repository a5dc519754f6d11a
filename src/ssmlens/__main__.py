"""`python -m ssmlens`: the command line."""

from ssmlens.cli import main

main()
