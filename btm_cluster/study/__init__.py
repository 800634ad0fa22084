"""A study: the paper's comparison with its baselines, controls and repeats."""
