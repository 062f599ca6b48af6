"""Experiments: the demo, and (later) methods x data sets x seeds."""
