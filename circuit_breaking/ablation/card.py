"""The model card of an ablated model: what is cut, how the edges were found, on what data, results."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from circuit_breaking.ablation.config import EdgeAblation
from circuit_breaking.graph import QKV
from circuit_breaking.models.families import graph_of

GENERIC = "automatically generated"  # in the card that transformers uploads with a model that has none
TAGS = ("edge-ablation", "circuit-breaking")


def model_card(title: str, record: EdgeAblation, base: PreTrainedConfig, license_name: str | None = None) -> str:
    """The card in Markdown, with metadata for the hub in front.

    Args:
        title: heading, such as the name of the folder.
        record: what is cut.
        base: configuration of the whole model.
        license_name: of the base model, None where it is not known.
    """
    graph = graph_of(base, split_qkv=any(edge.rpartition(".")[2] in QKV for edge in record.edges))
    source = f"[{record.base_model}](https://huggingface.co/{record.base_model})" if record.base_model else ""
    model = source or record.weights or f"A model of type `{record.base_model_type}`"
    carried = "the mean output of its source" if record.ablation == "mean" else "nothing (zero ablation)"
    from_where = f" from position {record.ablate_from} on" if record.ablate_from else ""
    cut = f"cut{from_where} ({', '.join(record.edges) or 'none'})"
    weights = f"The weights are loaded from `{record.weights}`. " if record.weights else ""
    return f"""{_metadata(record, license_name)}
# {title}

{model} with {len(record.edges)} of its {len(graph):,} causal edges {cut}.
A cut edge carries {carried}. Method: Li, Davies, Nadeau 2023, "Circuit Breaking: Removing Model Behaviors with
Targeted Ablation" (arXiv:2309.05973).

## Use

```python
import circuit_breaking  # registers the model type with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path or hub name of this model")
```

or `circuit_breaking.load_ablated("path or hub name of this model")`. {weights}The files hold data only, no code.

## How the edges were found

{_block(record.about)}

## Data

{_data(record.about)}

## Results

{_block(record.results)}
"""


def _metadata(record: EdgeAblation, license_name: str | None) -> str:
    """The hub's metadata, in YAML; a JSON string is one of YAML too."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if license_name:
        lines.append(f"license: {json.dumps(license_name)}")
    if record.base_model:
        lines.append(f"base_model: {json.dumps(record.base_model)}")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in TAGS), "---"])


def _block(what: dict[str, Any]) -> str:
    return f"```json\n{json.dumps(what, indent=2, ensure_ascii=False)}\n```" if what else "Not recorded."


def _data(about: dict[str, Any]) -> str:
    """The files that the edges were found on, by name, with the first digits of their SHA-256."""
    inputs = about.get("inputs")
    if not isinstance(inputs, dict) or not inputs:
        return "Not recorded." if "data" not in about else f"{about['data']}"
    return "\n".join(f"- `{Path(name).name}` (SHA-256 {str(digest)[:12]}...)" for name, digest in inputs.items())
