"""Text that is printed to the terminal."""
