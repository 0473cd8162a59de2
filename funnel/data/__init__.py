"""From files to batches: readers, tokenizer, encoded data sets, tasks."""
