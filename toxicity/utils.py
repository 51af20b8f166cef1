"""What the toxicity scripts share: where their data is by default, and prompts."""

from circuit_breaking.models.load import files_of
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.toxicity.inputs import load_prompts, read_prompt_rows
from circuit_breaking.toxicity.settings import FOLDER, default_data

__all__ = ["FOLDER", "check_counts", "default_data", "files_of", "load_prompts", "read_prompt_rows", "resolve_defaults"]
