"""Language models: opening them with their tokenizer, laying adapters on them, letting them answer."""
