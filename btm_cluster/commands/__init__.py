"""Groups of the command line's commands; `cli.py` has the others."""
