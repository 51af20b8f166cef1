"""What the toxicity scripts share: where their data is by default, and prompts."""

from circuit_breaking.models.load import files_of
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.files import DATA
from circuit_breaking.toxicity.inputs import default_data, load_prompts, read_prompt_rows

FOLDER = DATA / "toxicity"  # run folders, posts and means

__all__ = ["FOLDER", "check_counts", "default_data", "files_of", "load_prompts", "read_prompt_rows", "resolve_defaults"]
