"""The plan of a run: what will happen, decided and printed before it does."""

from danqing.plan.decide import ATTENTION, make_plan
from danqing.plan.plan import DTYPES, Plan, PlannedComponent
from danqing.plan.words import plan_lines

__all__ = ["ATTENTION", "DTYPES", "Plan", "PlannedComponent", "make_plan", "plan_lines"]
