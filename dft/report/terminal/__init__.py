"""Lines of text that are printed to the terminal."""
