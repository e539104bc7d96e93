"""Run the command line with `python -m sq_stream`."""

from sq_stream.cli import main

main()
