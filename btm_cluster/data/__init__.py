"""Text: from files to documents, tokenizers and token blocks. Knows no model and no store."""
