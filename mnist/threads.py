"""How many CPU threads the scripts of this folder compute with."""
