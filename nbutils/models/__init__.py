"""A model in: hub, checkpoint files, quantise, load in NF4, the tiny base."""
