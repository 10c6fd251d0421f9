"""Seer (arXiv 2511.14617) for verl: divided rollout, context-aware scheduling, grouped speculative decoding.

Here is the core that needs no stack: scheduling (`scheduler`, `context`), draft budgets (`budget`,
`acceptance`), grouped drafting (`drafting`) and a simulator of rollouts (`simulate`). Importing it imports neither
Ray, verl nor vLLM and loads no native library; `rollout` and `client`, which verl loads, import verl.
"""

from verl_seer.acceptance import AcceptanceStats
from verl_seer.budget import BudgetConfig, DraftBudget, draft_budget
from verl_seer.scheduler import Scheduler, SchedulerConfig
from verl_seer.state import Assignment, Instance, Request, Status

__all__ = [
    "AcceptanceStats",
    "Assignment",
    "BudgetConfig",
    "DraftBudget",
    "Instance",
    "Request",
    "Scheduler",
    "SchedulerConfig",
    "Status",
    "draft_budget",
]
