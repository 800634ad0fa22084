"""A file for each command: its arguments, one call of the operation of that name, and its output."""
