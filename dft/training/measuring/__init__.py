"""Metrics, throughput, non-finite detection and trackers."""
