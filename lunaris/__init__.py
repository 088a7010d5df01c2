"""Lunaris Codex: compose, train and launch Mixture-of-Experts language models."""

__version__ = "0.1.0"
