"""What the training loop calls: optimizer, evaluation, distributed training, the folder of a run."""
