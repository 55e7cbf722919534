"""Parts of the language tasks: rows and tokens, layers, measures, the card, a check of the data."""
