"""Parts of the training of RNA models: rows as tokens, the report on held-out transcripts, cards, the estimate."""
