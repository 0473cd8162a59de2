"""From files to batches: readers, tokenizer, encoded datasets, tasks."""
