"""Run folders and what is in them: files, records, checkpoints; signals, processes, devices, the command line.

First file to read: `run_folder`. Nothing here knows of a model."""
