"""Language models on one machine or one process group: texts, tokenizers, training, scoring. Knows nothing of Ray."""
