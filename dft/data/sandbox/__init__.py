"""Resource limits and worker processes for untrusted chat templates."""
