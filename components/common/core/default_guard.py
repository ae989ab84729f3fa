"""The guard of a recipe that names none: `evaluate` scores it, `ingest` keeps it out of training.

Its 32 short texts about everyday things were written for this project.
"""

NAME = "plain English"
URI = "package://nudge.pipelines.recipes/corpora/general/*.jsonl"
