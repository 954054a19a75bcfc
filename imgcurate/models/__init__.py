"""Encoders and heads: what they are, their weights, and how they run."""
