"""Compiled programs as XLA writes them: what is executed how often, what it costs, and what devices say meanwhile."""
