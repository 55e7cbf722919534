"""What the language tasks are made of: rows and tokens, layers, measures, the card, a look at the data."""
