"""What a training has used, earlier attempts included, and whether that stays within the budget."""

from nudge.components.common.core.errors import UserError
from nudge.components.common.spending.budget import OverBudget, over
from nudge.components.common.spending.usage import NOTHING, Meter, Usage, usage_of
from nudge.components.train.checkpoints.training_state import TrainingState
from nudge.components.train.limits import Limits
from nudge.components.train.ranks import Ranks

PROJECT_AFTER = 20
"""Steps after which the speed is known well enough to project what the training will use; the first
one is left out because it compiles and warms up."""


class Spending:
    """Measures all ranks together; every rank must make the same calls."""

    def __init__(self, ranks: Ranks, limits: Limits) -> None:
        self._ranks, self._limits = ranks, limits
        self._meter = Meter()
        self._before, self._resumed_at = NOTHING, 0
        self._first: tuple[int, Usage] | None = None

    def resume(self, state: TrainingState) -> None:
        """Count what the attempts before this one used."""
        self._before, self._resumed_at = usage_of(state.used) or NOTHING, state.step

    def total(self) -> Usage:
        """What all ranks used, including earlier attempts of this training."""
        own, ranks = self._meter.read(), self._ranks
        energy = self._meter.energy
        # One rank per node reads the counters, which count the node's CPUs and all its GPUs.
        joules = energy.joules() if ranks.local_rank == 0 else None
        seconds, core, gpu, nodes, known, used = ranks.sum(
            own.seconds if ranks.main else 0.0,  # every rank must come to the same decision
            own.core_seconds,
            own.seconds if ranks.device.type == "cuda" else 0.0,
            own.seconds if ranks.local_rank == 0 else 0.0,
            joules is not None,
            joules or 0.0,
        )
        now = Usage(
            seconds=seconds,
            core_seconds=core,
            gpu_seconds=gpu,
            node_seconds=nodes,
            joules=used if known else None,
        )
        return self._before + now

    def after_step(self, state: TrainingState, steps: int) -> str:
        """Once, after the first steps: why the training would exceed the budget; else empty."""
        done = state.step - self._resumed_at
        after = min(PROJECT_AFTER, max(2, steps // 10))
        if not self._limits.any or done not in (1, after):
            return ""
        used = self.total()
        if self._first is None:
            self._first = (state.step, used)
            return ""
        first, then = self._first
        left = (steps - state.step) / (state.step - first)
        projected = used + used.since(then).times(left)
        return over(
            self._limits.budget, self._limits.prices, self._limits.used + projected, "needs"
        )

    def at_checkpoint(self, used: Usage) -> str:
        """Why the budget is used up; empty if it is not."""
        return over(self._limits.budget, self._limits.prices, self._limits.used + used, "has used")

    def stop(self, why: str, state: TrainingState, steps: int, checkpoint: str) -> UserError:
        """The error that ends the training."""
        kept = f"the checkpoint is {checkpoint}" if checkpoint else "no checkpoint is kept"
        return OverBudget(
            f"{why}. Training stopped after step {state.step} of {steps}; {kept}. "
            "Raise the limit and rerun the same command to resume"
        )
