"""Ensembles as arithmetic on stored scores: how a text's mixture is fitted, kept and applied."""
