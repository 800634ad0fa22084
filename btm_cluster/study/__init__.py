"""A study: the paper's comparison with its rivals, controls and repeats, and the page made of it."""
