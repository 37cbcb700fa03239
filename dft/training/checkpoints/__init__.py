"""Write, verify, publish, find and load checkpoints."""
