"""Weights that a run starts from: those of another run, a checkpoint or a file."""
