"""Edges and weights cut in a stock Hugging Face model.

First file to read: `ablate`."""
