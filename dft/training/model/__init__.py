"""Load models and add adapters."""
