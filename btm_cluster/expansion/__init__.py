"""Domains that arrive after a forest is founded: the inbox, their texts, and
whether their experts are accepted."""
