"""Terminal output and input: live progress, tables, options. Knows no commands."""
