"""Behaviours to break and to keep: one file a task."""

from circuit_breaking.tasks.base import Task, TextTask
from circuit_breaking.tasks.ioi import IOITask
from circuit_breaking.tasks.owt import OWTTask
from circuit_breaking.tasks.toxic import ToxicTask

__all__ = ["IOITask", "OWTTask", "Task", "TextTask", "ToxicTask"]
