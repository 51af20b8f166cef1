"""The model that the project ships: its name in the settings and its folder. Imports no large library."""

from circuit_breaking.runs.files import DATA

SHIPPED = "tiny"  # its name in the settings
TINY = DATA / "tiny_gpt2"  # its folder, which data/make_tiny_gpt2.py writes
TEXT = TINY / "text"  # texts and prompts that it was trained for, and held-out ones
