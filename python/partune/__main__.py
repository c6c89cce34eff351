"""`python -m partune` is the command `partune`."""

from partune.cli import main

main()
