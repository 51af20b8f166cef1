"""The configuration of a saved ablated model: the base model's fields and which edges are cut.

    {"model_type": "edge_ablated", "n_layer": 12, ..., "edge_ablation": {"edges": ["a0.3->m5"], ...}}

transformers finds `AblatedConfig` by this `model_type` after `import circuit_breaking` (see `auto`). Nobody takes the
folder for the whole model: without the import, Auto classes do not know the type; and the class of the base model,
which would only warn of another type, refuses `NOTE`, which is stored where a configuration may name the weights' file.

This module imports nothing of the package that imports transformers, because it is imported while transformers is.
"""

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from circuit_breaking.errors import UserError
from circuit_breaking.runs.mask_record import MEANS, MeansRecord
from circuit_breaking.runs.records import Record
from circuit_breaking.runs.tensors import write_tensors

MODEL_TYPE = "edge_ablated"
MODEL_CLASS = "AblatedModelForCausalLM"
FIELD = "edge_ablation"  # of config.json
HINT = "Write an ablated model with save_ablated."
NOTE = "This model has cut edges: import circuit_breaking, and load it with AutoModelForCausalLM or load_ablated."
OWN = (FIELD, "attribute_map", "architectures", "means")  # attributes that are not the base configuration's


@dataclass(kw_only=True)
class EdgeAblation(Record):
    """What is cut in a saved ablated model; lies in its `config.json`, under `edge_ablation`.

    Attributes:
        base_model: name of the base model, for people; "" where it is unknown.
        base_model_type: `model_type` of the base model.
        weights: hub name of the model that the weights are loaded from, or `"tiny"`; None where they lie beside.
        edges: names of the cut edges.
        ablation: what they carry: zero, or the means in `means.safetensors`.
        ablate_from: first position at which the cuts act.
        about: how the edges were found.
        results: measurements, for the model card.
    """

    NAME: ClassVar[str] = "edge ablation"
    base_model: str = ""
    base_model_type: str
    weights: str | None = None
    edges: list[str]
    ablation: Literal["zero", "mean"]
    ablate_from: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_old(cls, value: Any, path: Path | str, hint: str) -> dict[str, Any]:
        raise UserError(f"{path} describes no saved ablated model. {hint}")


class AblatedConfig(PreTrainedConfig):
    """Configuration of an ablated model. All fields of the base model's configuration have their usual names.

    Attributes:
        edge_ablation: what is cut, as JSON.
        record: the same, checked.
        base_config: the configuration of the whole model.
        means: the ablation values [P, D], to be written beside the configuration by `save_pretrained`.
    """

    model_type = MODEL_TYPE

    def __init__(self, edge_ablation: Mapping[str, Any] | None = None, **fields: Any) -> None:
        base: PreTrainedConfig = PreTrainedConfig()
        if edge_ablation is not None:
            kind = base_class(edge_ablation, fields)
            ours = ("architectures", "model_type", "transformers_weights")
            base = kind(**{key: value for key, value in fields.items() if key not in ours})
        self.__dict__.update(base.__dict__)
        self.attribute_map = type(base).attribute_map  # so that hidden_size is n_embd where the base says so
        self.edge_ablation = edge_ablation
        self.architectures = [MODEL_CLASS]
        self.means: Tensor | None = None

    @classmethod
    def of(cls, base: PreTrainedConfig, record: EdgeAblation, means: Tensor | None = None) -> Self:
        """The configuration of a model that is cut, from that of the whole model."""
        config = cls()
        config.__dict__.update({key: value for key, value in base.__dict__.items() if key not in OWN})
        config.attribute_map, config.edge_ablation, config.means = base.attribute_map, record.to_json(), means
        return config

    @property
    def record(self) -> EdgeAblation:
        return EdgeAblation.from_json(self.edge_ablation, f"{self.name_or_path}/config.json", HINT)

    @property
    def base_config(self) -> PreTrainedConfig:
        fields = {key: value for key, value in self.__dict__.items() if key not in OWN}
        base = base_class(self.edge_ablation, fields)()
        base.__dict__.update(copy.deepcopy(fields))
        base.architectures = None
        return base

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        for name in ("attribute_map", "means"):
            fields.pop(name, None)
        return {**fields, "architectures": [MODEL_CLASS], "transformers_weights": NOTE}

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """Write the configuration, and the ablation values beside it."""
        path = Path(save_directory) / MEANS
        if self.means is not None:
            record = MeansRecord(model=self.record.base_model or None, ablate_from=self.record.ablate_from)
            write_tensors(path, {"means": self.means}, record.to_json())
        elif self.record.ablation == "zero":
            path.unlink(missing_ok=True)  # of another model that was saved here
        super().save_pretrained(save_directory, *args, **kwargs)


def base_class(edge_ablation: Any, fields: Mapping[str, Any]) -> type[PreTrainedConfig]:
    """The class of the base model's configuration. Raises a `UserError` for a damaged or unknown description."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # which may be what imports this module

    path = f"{fields.get('_name_or_path') or fields.get('name_or_path', '')}/config.json"
    kind = EdgeAblation.from_json(edge_ablation, path, HINT).base_model_type
    with suppress(KeyError):
        if kind != MODEL_TYPE:
            return CONFIG_MAPPING[kind]
    raise UserError(f"{path} is damaged: its base_model_type {kind!r} is unknown. {HINT}")
