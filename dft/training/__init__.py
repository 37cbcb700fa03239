"""Training: the trainer, its model, metrics and checkpoints."""
