"""Metrics of generated images, by a recorded protocol."""
