"""Convert data rows to validated conversations."""
