"""A study: the paper's comparison with its rivals, controls and repeats."""
