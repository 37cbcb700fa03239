"""Render conversations with chat templates and locate the supervised tokens."""
