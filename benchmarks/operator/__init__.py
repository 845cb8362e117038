"""The operator against what else there is, checked before it is timed."""

from benchmarks.operator.command import run

__all__ = ["run"]
