"""Many images from one manifest: rows are grouped by their references, and a run that was stopped goes on."""

from limner.batch.drawer import Drawer
from limner.batch.folder import done_before, finished_rows, is_whole
from limner.batch.journal import Journal, Result
from limner.batch.run import Batch, BatchSummary
from limner.batch.tasks import ENDINGS, BatchOptions, Group, Task

__all__ = [
    "ENDINGS",
    "Batch",
    "BatchOptions",
    "BatchSummary",
    "Drawer",
    "Group",
    "Journal",
    "Result",
    "Task",
    "done_before",
    "finished_rows",
    "is_whole",
]
