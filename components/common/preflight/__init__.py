"""Checks that report a problem before hours are spent: `checks.preflight` runs them for every way
of running; `train` checks the loaded model itself before its first step."""
