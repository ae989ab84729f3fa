"""Checks that report a problem before hours are spent: `preflight` of `checks` for every way of
running, and again, before the first training step, the checks of `train` on the loaded model."""
