"""What a run reads: sources -> documents, by a tokenizer -> batches."""
