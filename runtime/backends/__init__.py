"""The ways to run a model; each is imported only when it is chosen."""
