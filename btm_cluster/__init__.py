"""Branch-Train-Merge language-model training as a service on Ray."""

__version__ = "0.1.0"
