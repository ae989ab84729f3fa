"""Fixtures for tests of several folders."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.faulty_proxy import FaultyProxy
    from tests.nights import Nights

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for _name in (
    "NUDGE_HOME",
    "NUDGE_EVENTS",
    "NUDGE_REUSE",
    "NUDGE_RUN_ID",
    "NUDGE_REGISTRY_URL",
    "NUDGE_CHECKPOINTS",
):
    os.environ.pop(_name, None)


TOGETHER = {
    "tests/images/": "the daemon of containers",
    "tests/end_to_end/test_run.py": "the finished run",
    "tests/end_to_end/test_faults.py": "the finished run",
    "tests/end_to_end/test_nightly.py": "the nights",
    "tests/security/test_canaries.py": "the nights",
}
"""In parallel runs, the tests of one file stay together because they share fixtures; so do these
files, whose shared fixtures take minutes to create."""

LONGEST = (
    "tests/images/",
    "tests/end_to_end/",
    "tests/pipelines/test_rollback.py",
    "tests/components/train/",
    "tests/components/deploy/",
    "tests/components/register/",
    "tests/security/",
)
"""The folders and files whose tests take longest; they start first, so that none of them is left
running alone at the end."""


LONG = (
    "components/deploy/test_canary.py::test_a_candidate_that_serves_worse_loses_the_traffic[slow-local]",
    "components/deploy/test_concurrent_runs.py::test_a_person_m",
    "components/deploy/test_concurrent_runs.py::test_a_retried_rollback_is_refused",
    "components/deploy/test_concurrent_runs.py::test_a_split_is_not_ended_by_a_run",
    "components/deploy/test_interleavings.py::test_no_order_gives_traffic_to_a_version_that_lost[True-rollback]",
    "components/deploy/test_interleavings.py::test_no_order_of_canaries",
    "components/deploy/test_kserve.py::test_a_gateway_splits_the_traffic_on_a_cluster_without_routes",
    "components/deploy/test_kserve.py::test_concurrent_deploys_run_one_after_the_other",
    "components/ingest/test_downloads.py::test_a_redirect_to_another_scheme_is_refused",
    "components/ingest/test_reading.py::test_fetching_ahead_through_faults_gives_the_same_corpus",
    "components/ingest/test_sources.py::test_a_store_that_fails_a_fifth_of_the_time_gives_the_same_corpus",
    "components/ingest/test_sources.py::test_a_store_with_a_private_ca",
    "components/ingest/test_sources.py::test_the_web_with_faults_without_ranges_and_without_a_length",
    "components/ingest/test_state.py::test_in_a_store_an_unchanged_object_costs_no_request",
    "components/register/test_register.py::test_old_versions_are_archived_and_deleted_unless_needed",
    "components/train/checkpoints/test_checkpoint_store.py::test_checkpoints_survive_a_flaky_store",
    "components/train/checkpoints/test_resume.py::test_selected_on_lists_documents_only_if_there_was_a_choice",
    "components/train/checkpoints/test_resume.py::test_sigterm_writes_a_checkpoint_and_the_next_run_resumes",
    "components/train/checkpoints/test_resume.py::test_two_interruptions_give_the_same_bits[values1]",
    "components/train/cluster/test_launch.py::test_a_trained_model_comes_back",
    "components/train/test_ranks.py::test_the_step_raises_the_error_of_its_rank",
    "components/upload/test_sending.py::test_three_runs_through_faults",
    "end_to_end/test_faults.py::test_ending_the_command_ends_its_steps_and_the_next_run_goes_on",
    "kernels/test_autograd.py::test_compiles_under_inductor_and_autocast",
    "kernels/test_kernel_source.py::test_random_calls_equal_torch[dtype1",
    "kernels/test_kernel_source.py::test_random_calls_equal_torch[dtype2",
    "kernels/test_two_ranks.py::test_the_module_trains_under_fully_shard",
    "pipelines/cli/test_release.py::test_a_version_is_approved_or_rejected",
    "pipelines/cluster/test_parameters.py::test_a_recipe_that_is_too_long_is_sent_by_uri",
    "pipelines/local/test_bad_days.py::test_no_damaged_file_ends_in_a_traceback[NULs]",
    "pipelines/local/test_bad_days.py::test_no_damaged_file_ends_in_a_traceback[another",
    "pipelines/local/test_bad_days.py::test_no_damaged_file_ends_in_a_traceback[empty]",
    "pipelines/test_compile.py::test_compiling_in_another_process_gives_the_same_bytes",
    "pipelines/test_compile.py::test_made_files_are_current",
    "security/test_current_folder.py::test_no_rank_takes_code_from_the_current_folder",
    "security/test_read_is_registered.py::test_a_writer_of_the_bucket",
)  # fmt: skip
"""The beginnings of the names of tests that take over ten seconds on two cores; they run with the
long ones."""


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(LONG):
            item.add_marker(pytest.mark.long)

    def rank(item: pytest.Item) -> int:
        ranks = (n for n, path in enumerate(LONGEST) if item.nodeid.startswith(path))
        return next(ranks, len(LONGEST))

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            shared = (name for path, name in TOGETHER.items() if nodeid.startswith(path))
            return next(shared, super()._split_scope(nodeid))

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model's folder."""
    from tests.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def nights(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> "Iterator[Nights]":
    """`tests.nights.Nights`, completed."""
    from tests.nights import Nights

    nights = Nights(tmp_path_factory.mktemp("nightly"), tiny_model)
    try:
        nights.go_by()
        yield nights
    finally:
        nights.command("services", "down")


class Disk:
    """A disk of some KiB (tmpfs) at ``folder``, to test a full disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._mounted = False

    def resize(self, kib: int) -> Path:
        option = f"{'remount,' if self._mounted else ''}size={kib}k"
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small disk needs the right to mount tmpfs: {done.stderr.strip()}")
        self._mounted = True
        return self.folder

    def remove(self) -> None:
        if self._mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.remove()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A separate home for embedded services; everything started there is stopped."""
    from nudge.pipelines.local import services

    folder = tmp_path / "home"
    monkeypatch.setenv("NUDGE_HOME", str(folder))
    yield folder
    services.down(folder)


@pytest.fixture
def connected(home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Sets and returns the variables of an embedded object store and registry."""
    from nudge.pipelines.local import services

    environment = services.up(home)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


@pytest.fixture
def faulty_proxy() -> "Iterator[Callable[..., FaultyProxy]]":
    """Makes a `FaultyProxy` in front of a URL; every one made is stopped after the test."""
    from tests.faulty_proxy import FaultyProxy

    with ExitStack() as stack:

        def made(upstream: str, **options: Any) -> FaultyProxy:
            return stack.enter_context(FaultyProxy(upstream, **options))

        yield made
