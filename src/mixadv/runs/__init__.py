"""Directories of runs: claimed, locked, continued; sweeps of them, and the processes that share one."""
