"""The plan of a run: what will happen, decided and printed before it does."""

from danqing.plan.decide import ATTENTION, DTYPES, Plan, PlannedComponent, make_plan

__all__ = ["ATTENTION", "DTYPES", "Plan", "PlannedComponent", "make_plan"]
