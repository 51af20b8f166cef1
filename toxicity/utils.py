"""What the toxicity scripts share: where their data is by default, and prompts."""

from circuit_breaking.files import DATA
from circuit_breaking.scripts import check_counts, files_of, fill_in
from circuit_breaking.toxic_inputs import default_data, load_prompts, read_prompt_rows

FOLDER = DATA / "toxicity"  # run folders, posts and means

__all__ = ["FOLDER", "check_counts", "default_data", "files_of", "fill_in", "load_prompts", "read_prompt_rows"]
