"""Budgets to plans: how to spend bits once it is known what matters. `ALLOCATORS` is the registry."""

from lq.allocation.allocate import ALLOCATORS, allocate
from lq.allocation.plan import Plan, adapted, uniform_plan

__all__ = ["ALLOCATORS", "Plan", "adapted", "allocate", "uniform_plan"]
