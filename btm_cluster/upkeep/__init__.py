"""Looking after a forest and its store: verify, collect, remove, purge, and what each expert is worth."""
