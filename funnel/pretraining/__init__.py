"""Pretraining: corpora of text, and the objectives ELECTRA, masked language modeling and distillation."""
