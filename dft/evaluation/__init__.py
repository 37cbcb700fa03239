"""Evaluation by generation: sample answers to problems, grade them and compute accuracies."""
