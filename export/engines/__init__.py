"""Engines: compiled from the graphs of a bundle, and installed in it."""
