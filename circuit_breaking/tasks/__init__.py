"""Behaviours to break and to keep: one file a task.

First file to read: `base`.
"""

from circuit_breaking import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "IOITask": "circuit_breaking.tasks.ioi",
        "OWTTask": "circuit_breaking.tasks.owt",
        "PromptTask": "circuit_breaking.tasks.prompts",
        "Task": "circuit_breaking.tasks.base",
        "TextTask": "circuit_breaking.tasks.base",
        "ToxicTask": "circuit_breaking.tasks.toxic",
        "prompt_task": "circuit_breaking.tasks.registry",
    },
)
