"""What a model does after its edges were cut: measured, compared, reported.

First file to read: `measure`."""
