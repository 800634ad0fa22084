"""What each command does: a file by the name of each in `commands/`. Prints nothing."""
