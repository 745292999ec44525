"""Runs and what happens around them: processes, resuming, sweeps, finders, dashboards."""
