"""Write a Hugging Face model and its tokenizer as a folder."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from circuit_breaking.errors import UserError, one_line

CONFIG = "config.json"


def save_hf_folder(
    folder: Path | str,
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    write_records: Callable[[Path], None] | None = None,
) -> None:
    """Write a model as a folder that `from_pretrained` reads, or leave what was there before; see `staged_folder`.

    Args:
        folder: the folder.
        hf: the model.
        tokenizer: its tokenizer.
        write_records: writes further files into the folder that it is given. They are replaced together with the
            model's, so a record never lies beside another model.

    Raises:
        UserError: the folder cannot be written.
    """
    forget_gguf(hf)
    with staged_folder(folder) as staged:
        hf.save_pretrained(staged)
        save_tokenizer(staged, tokenizer)
        if write_records is not None:
            write_records(staged)


def forget_gguf(hf: PreTrainedModel) -> None:
    """Let a model be saved whose weights transformers has unpacked from a GGUF file, which it would refuse."""
    quantizer = getattr(hf, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if method == "gguf" and all(parameter.is_floating_point() for parameter in hf.parameters()):
        quantizer.remove_quantization_config(hf)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write a tokenizer, if there is one, into the folder of its model."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextmanager
def staged_folder(folder: Path | str) -> Iterator[Path]:
    """A temporary folder beside `folder`, whose files replace those of `folder` if the block ends without an error.

    An error, such as a full disk, leaves a former model in `folder` whole. Hidden files and subfolders in `folder`
    stay, as a run may keep its checkpoints there.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    staged = folder.with_name(f".{folder.name}.saving")
    try:
        shutil.rmtree(staged, ignore_errors=True)  # a killed process may have left it
        staged.mkdir(parents=True)
        yield staged
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
