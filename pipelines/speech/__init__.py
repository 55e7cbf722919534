"""Speech models (Whisper): sound in, text with times out, with adapters."""
