"""`python -m manylora.server.cli`: the command, where no script is installed."""

from manylora.server.cli import main

main()
