"""The work of each command, in a file of the same name as in `commands/`. Prints nothing."""
