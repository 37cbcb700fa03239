"""Where data and loss meet: the trainer, its model, metrics and checkpoints."""
