"""Documents as token ids and image slots: vocabulary, prompts, sequences, visibility, batches."""
