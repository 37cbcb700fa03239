"""Memory estimates, the training plan and out-of-memory handling."""
