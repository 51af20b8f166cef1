"""What the indirect-object scripts share: prompts, settings of a run, the published circuit."""
