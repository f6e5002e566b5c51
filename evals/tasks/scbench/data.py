"""What the YAML files name: lm-eval loads functions from a file beside them."""

from functools import partial

from kvplug_evals.scbench.documents import documents, mean, process_results, text
from kvplug_evals.scbench.tasks import TASKS

globals().update({name: partial(documents, name) for name in TASKS})

__all__ = [*TASKS, "mean", "process_results", "text"]
