"""Data: sources, conversations, chat templates, tokenization, row cache, packing, batches."""
