"""Command-line flags: one dataclass per topic, and the conflicts between them."""
