"""``python -m nudge.pipelines.cli``: the command `nudge` where no program of that name is."""

from nudge.pipelines.cli.main import main

main(prog_name="nudge")
