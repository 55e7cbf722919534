"""Jobs: long work outside the process that asked for it, one at a time per device, recorded whatever happens.

Pages and commands use the functions named here; the rest of the package is internal.
"""

from studio.jobs.control import (
    cancel,
    clean,
    delete,
    ensure_worker,
    get,
    history,
    log,
    mates,
    packed,
    rerun,
    resume,
    resume_here,
    run_here,
    run_together_here,
    submit,
    submit_together,
    together,
    trouble,
    workers,
)
from studio.jobs.control import newest as list
from studio.jobs.kinds import Kind, register
from studio.jobs.model import ACTIVE, ENDED, STATUSES, Job, ProgressRow, Status

__all__ = [
    "ACTIVE", "ENDED", "STATUSES", "Job", "Kind", "ProgressRow", "Status", "cancel", "clean", "delete",
    "ensure_worker", "get", "history", "list", "log", "mates", "packed", "register", "rerun", "resume", "resume_here",
    "run_here", "run_together_here", "submit", "submit_together", "together", "trouble", "workers",
]  # fmt: skip
