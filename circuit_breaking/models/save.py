"""Write a Hugging Face model and its tokenizer as a folder."""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from circuit_breaking.errors import UserError, one_line

CONFIG = "config.json"


def save_hf_folder(folder: Path | str, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write a model as a folder that `from_pretrained` reads.

    Everything is written to a temporary folder beside `folder` first, so an error, such as a full disk, leaves a former
    model whole. Then the files of the former model are replaced. Hidden files and subfolders in `folder` stay, as a run
    may keep its checkpoints there.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    staged = folder.with_name(f".{folder.name}.saving")
    try:
        shutil.rmtree(staged, ignore_errors=True)  # a killed process may have left it
        staged.mkdir(parents=True)
        hf.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        for path in staged.rglob("*"):
            if path.is_file():
                path.chmod(staged.stat().st_mode & 0o666)  # safetensors writes files that only their owner can read
        _install(staged, folder)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the disk says
        why = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot write {folder}: {why}. Choose another folder.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _install(staged: Path, folder: Path) -> None:
    """Move the files of `staged` into `folder`. Without its configuration a folder is no model: that file is the first
    to go and the last to come."""
    if not folder.exists():
        staged.rename(folder)
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name != CONFIG):
        if path.is_file() and not path.name.startswith("."):
            path.unlink()
    for path in sorted(staged.iterdir(), key=lambda path: path.name == CONFIG):
        path.replace(folder / path.name)
