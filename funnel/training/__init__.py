"""What the training loop calls: optimizer, evaluation, distributed training, run folders."""
