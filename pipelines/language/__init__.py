"""Language models: loading them with their tokenizer, applying adapters, generating answers."""
