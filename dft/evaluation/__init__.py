"""Evaluation by generation: problems in, graded samples and accuracies out. Knows no trainer."""
