"""Text <-> token ids: the embedded word-level vocabulary, and published tokenizers with their chat templates."""
