"""Solvers: functions from a noise schedule to the rows of a `StepTable`."""
