"""Checks that report a problem before hours are spent; each way of running makes those it can.

`nudge run` makes all of them before it starts anything. On a cluster the first step checks the
texts and the names, `tokenize` the base model's tokenizer, and `train`, before its first step, the
base model itself and the packages that `evaluate` needs in the same image.
"""
