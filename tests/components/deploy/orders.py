"""Actors that deploy, move traffic and approve, and every order of their steps.

Each actor is a thread that stops before every step. `Orders` follows all orders of the steps and
checks the invariants of `World` at each change of the traffic.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from nudge.components.common.artifacts.comparison import comparison_properties
from nudge.components.common.clients.registry.releases import Served, Version
from nudge.components.common.core.errors import UserError
from nudge.components.deploy import deploy as deploying
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import ModelServer
from nudge.components.evaluate import incumbent as standing

MODEL = "m"
SETTINGS = DeploySettings(target="local", registry_url="http://registry")
APPROVAL = DeploySettings(
    target="local", registry_url="http://registry", approval="required", approval_days=0
)
QUALITY = {"v0": 0, "v1": 1, "worse": 2, "better": 3}
RUNS = ("better", "worse")
RETRIES = ("retry", "resume")
"""What may follow a killed deploy: KFP retries the step, or the run resumes at its evaluation."""
CHANGES = ("move", "note_served", "note", "note_promotion", "retire", "observe")
Choice = tuple[str, str]


class Killed(BaseException):
    """Represents SIGKILL: no handler catches it to clean up."""


class Abandoned(BaseException):
    """Ends an actor whose order is not followed further."""


class Actor(threading.Thread):
    """Runs to its next step, names it in ``label``, and waits for the command to take it."""

    def __init__(self, name: str, work: Callable[["Actor"], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.label, self.ended = "", False
        self.seen: tuple[str, ...] = ()
        self.well = False
        self.problem: Exception | None = None
        self._work, self._command = work, ""
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        try:
            self._work(self)
            self.well = True
        except (Killed, Abandoned):
            self.well = True
        except (AssertionError, UserError) as problem:
            self.problem = problem
        finally:  # pytest shows any other exception
            self.ended, self.label = True, "ended"
            self._paused.release()

    def begin(self) -> None:
        self.start()
        self._paused.acquire()

    def take(self, command: str) -> None:
        """Let the actor take its step ("go"), or be killed before it ("kill")."""
        self._command = command
        self._go.release()
        self._paused.acquire()

    def step(self, label: str) -> str:
        self.label = label
        self._paused.release()
        self._go.acquire()
        if self._command == "kill":
            raise Killed
        if self._command == "abandon":
            raise Abandoned
        return self._command


class World:
    """Traffic and registry in memory; the `Target` of every actor."""

    environment, runtime = "test", "none"

    def __init__(self, served: bool) -> None:
        self.versions = {name: registered(name, {}) for name in ("v0", "v1")}
        self.shares: dict[str, int] = {"v1": 100} if served else {}
        self.up = set(self.shares)
        self.served = Served(MODEL, "http://e", {"v1": 100}, ("v0", "v1")) if served else None
        self.holder: str | None = None
        self.taken: frozenset[str] = frozenset()
        """Versions whose traffic the person withdrew."""
        self.compared: dict[str, str] = {}
        self.kills = 0
        self.settings = SETTINGS
        self.approved: frozenset[str] = frozenset()
        self.slow: frozenset[str] = frozenset()
        """Candidates that serve worse than the incumbent, which only their canary finds out."""
        self.went_back: frozenset[str] = frozenset()

    def state(self, actors: dict[str, Actor]) -> Any:
        """Everything that the following steps may depend on."""
        active = {name: each for name, each in actors.items() if not each.ended}
        return repr(
            (
                self.shares, sorted(self.up), self.served, self.holder, self.kills, self.approved,
                self.went_back,
                {name: each.properties for name, each in self.versions.items()},
                sorted(self.taken & active.keys()),
                [(name, self.compared.get(name), each.label, each.seen)
                 for name, each in active.items()],
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def exclusive(self, model: str) -> Iterator[None]:
        actor().step("lease")
        assert self.holder is None
        self.holder = actor().name
        try:
            yield
        finally:
            self.holder = None

    def live(self, model: str) -> dict[str, int]:
        actor().seen = (str(self.shares), str(self.served))
        return dict(self.shares)

    def make_room(self, model: str, wanted: set[str]) -> bool:
        return False

    def bring_up(self, version: Version) -> ModelServer:
        self.up.add(version.name)
        return ModelServer("http://s")

    def move(self, model: str, shares: dict[str, int]) -> str:
        actor().step("move")
        assert self.holder == actor().name
        assert set(shares) <= self.up
        previous, who = set(self.shares), actor().name
        if who in RUNS:
            assert self.settings.approval == "none", "nobody approved it"
            replaced = previous - {who}
            assert all(QUALITY[each] < QUALITY[who] for each in replaced), "it lost to it"
            assert replaced <= {self.compared[who]}, "it was not compared with it"
            assert who not in self.taken, "a person withdrew its traffic"
            if who in shares:
                assert who not in self.went_back, "its canary went back"
                canary = self.settings.canary
                assert shares[who] in (canary or [100])
                done = [0, *canary][[*canary, 100].index(shares[who])] if canary else 0
                known = self.shares.get(who, 0)
                assert not previous - {who} or known in (done, shares[who]), "it skipped a share"
                assert not (who in self.slow and previous and shares[who] == 100), "it is slow"
            else:
                self.went_back |= {who}
        elif who == "approver":
            (name,) = shares
            assert name in self.approved, "nobody approved it"
            compared = self.versions[name].properties["incumbent"]
            assert previous <= {compared, name}, "the baseline moved"
        else:
            self.taken = (self.taken | previous) - set(shares)
        self.shares = dict(shares)
        return "http://e"

    def counts(self, model: str, version: str) -> None:
        return None

    def retire(self, model: str, keep: set[str]) -> None:
        actor().step("retire")
        assert set(self.shares) <= keep
        self.up &= keep


def actor() -> Actor:
    current = threading.current_thread()
    assert isinstance(current, Actor)
    return current


def registered(name: str, properties: dict[str, Any]) -> Version:
    return Version(MODEL, name, "1", name, "s3://b/v", False, 0, {"run_id": name, **properties})


def run_of(world: World) -> Callable[[Actor], None]:
    """A run starting at its evaluation; its candidate is registered if it beats the incumbent."""

    def evaluate(me: Actor) -> bool:
        me.step("evaluate")
        os.environ["NUDGE_RUN_ID"] = me.name
        found = standing.find_incumbent(MODEL, SETTINGS.registry_url)
        world.compared[me.name] = found.version
        world.taken -= {me.name}  # from here on it is compared with the version the person chose
        if found.state == "found" and QUALITY[me.name] <= QUALITY[found.version]:
            return False
        known = world.versions.get(me.name)  # a run that is registered already keeps its record
        properties = {**(known.properties if known else {}), **comparison_properties(found)}
        world.versions[me.name] = registered(me.name, properties)
        return True

    def work(me: Actor) -> None:
        if not evaluate(me):
            return
        while True:
            try:
                deploying.deploy(world.settings, registered_model=MODEL, version=me.name)
                return
            except Killed:
                me.seen = ()
                if me.step("killed") == "resume" and not evaluate(me):
                    return

    return work


def person(world: World, shares: dict[str, int] | None) -> Callable[[Actor], None]:
    """`nudge promote`, `nudge split` or, without shares, `nudge rollback`."""

    def work(me: Actor) -> None:
        if shares is None:
            me.step("look")
        with contextlib.suppress(UserError):  # there is no version to return to, or no such version
            if shares is None:
                deploying.rollback(SETTINGS, registered_model=MODEL)
            else:
                deploying.serve(SETTINGS, MODEL, shares)

    return work


def approver(world: World) -> Callable[[Actor], None]:
    """Approves both candidates, if they wait by then, and serves each."""
    world.settings = APPROVAL

    def work(me: Actor) -> None:
        for version in ("worse", "better"):
            me.step(f"approve {version}")
            with contextlib.suppress(UserError):  # it does not wait
                deploying.decide(APPROVAL, MODEL, version, "approved")
        for version in ("worse", "better"):
            with contextlib.suppress(UserError):  # nobody approved it, or it must not be served
                deploying.serve_approved(APPROVAL, registered_model=MODEL, version=version)

    return work


class Orders:
    """Follows every order of the actors' steps, depth first."""

    def __init__(
        self,
        served: bool,
        by_hand: Callable[[World], Callable[[Actor], None]] | None,
        name: str = "person",
        settings: DeploySettings = SETTINGS,
        slow: str = "",
    ) -> None:
        self._served, self._by_hand, self._name = served, by_hand, name
        self._settings, self._slow = settings, slow
        self._known: set[str] = set()
        self.followed = 0
        self.ends: set[str] = set()
        self.world = World(served)

    def follow(self) -> None:
        waiting: list[list[Choice]] = [[]]
        while waiting:
            waiting += self._follow(waiting.pop())
            self.followed += 1

    def _follow(self, order: list[Choice]) -> list[list[Choice]]:
        """Follow one order to its end; returns the orders that branch off."""
        world = self.world = World(self._served)
        world.settings, world.slow = self._settings, frozenset({self._slow} - {""})
        actors = {name: Actor(name, run_of(world)) for name in RUNS}
        if self._by_hand:
            actors[self._name] = Actor(self._name, self._by_hand(world))
        for each in actors.values():
            each.begin()
        branches: list[list[Choice]] = []
        taken: list[Choice] = []
        try:
            while True:
                if len(taken) >= len(order):
                    state = world.state(actors)
                    if state in self._known:
                        break
                    self._known.add(state)
                choices = _choices(world, actors)
                if not choices:
                    self.ends.add(" ".join(world.shares))
                    break
                if len(taken) < len(order):
                    choice = order[len(taken)]
                else:
                    choice, *others = choices
                    branches += [[*taken, other] for other in others]
                taken.append(choice)
                name, command = choice
                world.kills += command == "kill"
                actors[name].take(command)
                if actors[name].ended and not actors[name].well:
                    problem = actors[name].problem
                    raise AssertionError(f"{problem!r} after {taken}") from problem
        finally:
            for each in actors.values():
                while not each.ended:
                    each.take("abandon")
        return branches


def _choices(world: World, actors: dict[str, Actor]) -> list[Choice]:
    choices = []
    for name, each in actors.items():
        if each.ended or (each.label == "lease" and world.holder):
            continue
        if each.label == "killed":
            choices += [(name, command) for command in RETRIES]
            continue
        choices.append((name, "go"))
        # Killed before any change: a run may resume at its evaluation, and a person who never
        # started is already among the orders.
        changed = each.label in CHANGES
        if not world.kills and (changed or (each.label == "lease" and name in RUNS)):
            choices.append((name, "kill"))
    return choices
