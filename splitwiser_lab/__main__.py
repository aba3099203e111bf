"""`python -m splitwiser_lab` is `splitwiser-lab`."""

from splitwiser_lab.cli import main

main()
