"""What a step used: CPU time of its children too, energy with counters that wrap, and costs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.artifacts.cost import cost_of
from nudge.components.common.core.step import step
from nudge.components.common.spending import energy
from nudge.components.common.spending.budget import over
from nudge.components.common.spending.energy import Energy
from nudge.components.common.spending.prices import Budget, Prices
from nudge.components.common.spending.usage import Usage, add, measured, of_earlier_steps

BURN = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"


def zone(folder: Path, name: str, label: str, microjoules: int, size: int = 1000) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "name").write_text(f"{label}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{size}\n")
    return path


def test_packages_count_once_and_their_counters_may_wrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of https://docs.kernel.org/power/powercap/powercap.html."""
    first = zone(tmp_path, "intel-rapl:0", "package-0", 900, size=1000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 100, size=1000)
    inside = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    everything = zone(tmp_path, "intel-rapl:2", "psys", 0)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    meter = Energy()
    (first / "energy_uj").write_text("50")  # 900 -> 1000 and on from 0: 150
    (second / "energy_uj").write_text("300")
    for other in (inside, everything):
        (other / "energy_uj").write_text("999")
    assert meter.joules() == pytest.approx(350e-6)
    (first / "energy_uj").write_text("60")
    assert meter.joules() == pytest.approx(360e-6)
    meter.close()


def test_without_a_readable_counter_there_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert Energy().joules() is None


def test_the_cpu_time_of_children_counts_and_what_other_nodes_used_is_added() -> None:
    with measured() as outer:
        with measured():
            subprocess.run([sys.executable, "-c", BURN], check=True)
            add(Usage(core_seconds=100.0, gpu_seconds=7200.0, joules=5.0))
        used = outer.read()
    assert used.core_seconds > 100.25
    assert used.gpu_hours == 2.0
    assert used.joules is not None
    assert used.joules >= 5.0


def test_a_reused_step_says_what_it_used_when_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUDGE_REUSE", str(tmp_path / "reuse"))
    calls: list[str] = []

    @step("burn", outputs=("made",), no_inputs=("budget",))
    def burn(text: str, *, made: Path, budget: float = 0.0) -> dict[str, Any]:
        calls.append(text)
        add(Usage(core_seconds=50.0))
        made.write_text(text)
        return {}

    for number, budget in enumerate((1.0, 2.0)):
        monkeypatch.setenv("NUDGE_EVENTS", str(tmp_path / f"events-{number}"))
        burn("same", made=tmp_path / f"made-{number}", budget=budget)
    assert calls == ["same"]  # another budget makes nothing else
    spent = of_earlier_steps(reused=False)["burn"]
    made = of_earlier_steps(reused=True)["burn"]
    assert spent.core_seconds < 50.0 <= made.core_seconds
    (tmp_path / "reuse" / "burn").is_dir()
    (kept,) = (tmp_path / "reuse" / "burn").glob("*/usage.json")
    kept.unlink()  # as an older nudge kept it
    monkeypatch.setenv("NUDGE_EVENTS", str(tmp_path / "events-2"))
    burn("same", made=tmp_path / "made-2")
    assert calls == ["same"]


def test_a_failed_step_says_what_it_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUDGE_EVENTS", str(tmp_path / "events"))

    @step("burst", reuse=False)
    def burst() -> dict[str, Any]:
        add(Usage(gpu_seconds=3600.0))
        raise ValueError("it burst")

    with pytest.raises(ValueError, match="it burst"):
        burst()
    event = json.loads((tmp_path / "events").read_text().splitlines()[-1])
    assert event["usage"]["gpu_seconds"] == 3600.0


def test_costs_add_up_and_are_shared_by_the_gain() -> None:
    prices = Prices(gpu_hour=3.0, core_hour=0.05, kwh=0.25, currency="EUR")
    usages = {
        "tokenize": Usage(core_seconds=7200.0),
        "train": Usage(gpu_seconds=4 * 3600.0, core_seconds=3600.0, joules=7.2e6),
    }
    cost = cost_of(usages, prices, -0.05)
    assert cost.steps["tokenize"].cost == pytest.approx(0.10)
    assert cost.total.cost == pytest.approx(4 * 3.0 + 3 * 0.05 + 2 * 0.25)
    assert cost.per_gained_bit == pytest.approx(12.65 / 0.05)
    assert cost.properties()["usage.train.kwh"] == pytest.approx(2.0)
    worse = cost_of(usages, prices, 0.01)
    assert worse.gained_bits_per_byte is None
    assert worse.per_gained_bit is None
    unpriced = cost_of(usages, Prices(), -0.05)
    assert (unpriced.total.cost, unpriced.currency) == (None, "")
    assert unpriced.gpu_hours_per_gained_bit == pytest.approx(80.0)


def test_each_limit_of_a_budget_is_compared_with_its_own_amount() -> None:
    used = Usage(seconds=7200.0, core_seconds=36_000.0, gpu_seconds=3600.0)
    prices = Prices(gpu_hour=4.0)
    for name, limit in {"cost": 3.0, "gpu_hours": 0.5, "core_hours": 9.0, "hours": 1.5}.items():
        assert f"budget.{name} is {limit:g}" in over(Budget(**{name: limit}), prices, used, "needs")
        assert over(Budget(**{name: 11.0}), prices, used, "needs") == ""
