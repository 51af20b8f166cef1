"""The class of a whole model while its edges are cut: a subclass of its own that saves the cuts with the weights.

`save_pretrained` is what `push_to_hub` and the checkpoints of `Trainer` call, so these keep the cuts too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from circuit_breaking.ablation.card import GENERIC, model_card
from circuit_breaking.ablation.config import AblatedConfig, EdgeAblation
from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe
from circuit_breaking.models.save import forget_gguf
from circuit_breaking.runs.files import write_text

CARD = "README.md"
EARLY = "assistant_early_exit"  # argument of `generate`: drafts by the first layers alone


class AblatedModel:
    """A causal language model with cut edges, whose `edge_cuts` is its `Ablation`."""

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """Write weights, configuration and ablation values so that the cuts are kept; see `config`.

        Raises:
            UserError: the model has adapters, which would be saved alone, without the cuts, or under other names; or
                its edges are not cut and their ablation values only added.
        """
        describe(self)
        if not self.edge_cuts.removes:
            raise UserError(
                "in this model ablation values are added and no edge is cut (removes=False), which is not saved. Save "
                "the edges and the values."
            )
        if getattr(self, "_hf_peft_config_loaded", False):
            raise UserError(
                "this model has cut edges and adapters, and adapters are saved without the model. Merge them first."
            )
        record = record_of(self, self.config)
        with _config_with_cuts(self, record, self.edge_cuts.means):
            super().save_pretrained(save_directory, *args, **kwargs)
        card = Path(save_directory) / CARD
        if kwargs.get("is_main_process", True) and not card.exists():
            write_text(card, model_card(Path(save_directory).name, record, self.config))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what would run only the first layers, whose hidden state is not the stream alone."""
        configs = (kwargs.get("generation_config"), self.generation_config)
        if any(one for one in (kwargs.get(EARLY), *(getattr(config, EARLY, None) for config in configs))):
            raise UserError(f"{EARLY} does not support cut edges. Give an assistant_model, or leave it out.")
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what `generate_batch` is made with."""
        raise UserError(
            "generate_batch (continuous batching) does not support cut edges. Use generate with a padded batch."
        )

    def _upload_modified_files(self, working_dir: str | PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        card = Path(working_dir) / CARD
        if not card.exists() or GENERIC in card.read_text(encoding="utf-8"):  # not somebody's own card
            whole = self.config.base_config if isinstance(self.config, AblatedConfig) else self.config
            write_text(card, model_card(repo_id.rpartition("/")[2], record_of(self, whole), whole))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """As of `AutoModelForCausalLM`: whether edges are cut is up to what is loaded, not to this class."""
        kwargs.pop("use_safetensors", None)  # no other format is read
        return AutoModelForCausalLM.from_pretrained(*args, use_safetensors=True, **kwargs)


def record_of(hf: PreTrainedModel, whole: PreTrainedConfig) -> EdgeAblation:
    """What is cut in a model, as it is saved with the model's weights. `whole` configures the model without cuts."""
    handle = hf.edge_cuts
    if handle.resampled:
        raise UserError(
            "cut edges carry outputs on one counterfactual batch, with which the model cannot be saved. Save it after "
            "the block of `resampling`."
        )
    return EdgeAblation(
        base_model=handle.base_model, base_model_type=whole.model_type, edges=list(map(str, handle.edges)),
        ablation="zero" if handle.means is None else "mean", ablate_from=handle.ablate_from,
        about=handle.about,
    )  # fmt: skip


def save_with_cuts(hf: PreTrainedModel, folder: Path, record: EdgeAblation, means: Tensor | None) -> None:
    """Write a model, with or without cut edges, as one with the edges of `record` cut."""
    with _config_with_cuts(hf, record, means):
        PreTrainedModel.save_pretrained(hf, folder)


@contextmanager
def _config_with_cuts(hf: PreTrainedModel, record: EdgeAblation, means: Tensor | None) -> Iterator[None]:
    """Inside the block, the configuration of a model says what is cut in it. Outside it is that of the whole model, by
    which transformers knows how to run it."""
    forget_gguf(hf)
    whole = hf.config
    hf.config = AblatedConfig.of(whole, record, means)
    try:
        yield
    finally:
        hf.config = whole


def hub_name(config: PreTrainedConfig) -> str:
    """The name on the hub that a model was loaded by, "" for a model from a folder or of another origin."""
    name = getattr(config, "name_or_path", "") or ""
    return "" if Path(name).exists() or name.count("/") > 1 or name.startswith((".", "/", "~")) else name
