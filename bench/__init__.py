"""Repeatable measurements with one result format: `python -m bench` runs them all, `python -m bench push` one."""
