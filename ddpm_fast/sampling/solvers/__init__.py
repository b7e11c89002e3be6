"""The solvers: functions that turn a schedule into the rows of a `StepTable`.

Each takes the class of the table first, and is one of its classmethods.
"""
