"""The long forms of the fault suites: ``python -m tests.faults SUITE... --seconds S --seed N``.

    python -m tests.faults --seconds 3600 --seed 1          all suites, an hour in all
    python -m tests.faults nth --part 1/2                   every second failure of every call
    python -m tests.faults sequences                        all 584, every crash point
    python -m tests.faults kills --kills 10000 --directory DIR     SIGKILLs
    python -m tests.faults soak --seconds 3600                     mixed work, a kill every 30 s
    python -m tests.faults cuts --kills 200                        power cuts of a loop-mounted ext4
    python -m tests.faults simulation --seed 7                     simulated worlds, seed after seed
    python -m tests.faults redis --replies 10000                   lost replies, servers in trouble
    python -m tests.faults cancels --cancels 100000                calls of Redis that are given up
    python -m tests.faults damages --damages 10000000              several wrong bytes in a log
    python -m tests.faults memory                                  every allocation that can fail
    python -m tests.faults fuzz                                    hostile bytes for every decoder
    python -m tests.faults mutants                                 the engine with one guard removed

Each suite prints what it has done when its time is over, and the first failure with all that is
needed to see it again. The exit code is 1 if there was one.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.crashes import Nursery
from tests.faults import fuzzing, mutants, nomemory, nthcall, sequences
from tests.faults.damages import Damages
from tests.faults.kernel import NotHere, ext4
from tests.faults.killpoints import POINTS
from tests.faults.kills import Kills
from tests.faults.powercuts import PowerCuts
from tests.faults.redisfaults import Trouble, cancel_calls, lose_replies
from tests.faults.simulation import stepped
from tests.faults.simworld import simulate
from tests.faults.soak import Soak

_PROGRESS_SECONDS = 30.0
_FAILURES_PER_RUN = 2000  # of the n-th call: by chance from all, so that each run has some of each


class Run:
    """One run of a suite: its arguments, its time, and how often it has failed."""

    def __init__(self, arguments: argparse.Namespace, seconds: float) -> None:
        self.seed: int = arguments.seed
        self.kills: int = arguments.kills
        self.replies: int = arguments.replies
        self.worlds: int = arguments.worlds
        self.cancels: int = arguments.cancels
        self.damages: int = arguments.damages
        part, parts = map(int, arguments.part.split("/"))
        self.part = slice(part - 1, None, parts)
        self.skip: int = arguments.skip
        self.only: str = arguments.only
        self.directory: str | None = arguments.directory
        if self.directory is not None:
            Path(self.directory).mkdir(parents=True, exist_ok=True)
        self.failures = 0
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._told = time.monotonic()

    def goes_on(self) -> bool:
        """Whether there is time left."""
        return time.monotonic() < self._end

    def left(self) -> float:
        """Return how much time is left, seconds."""
        return max(1.0, self._end - time.monotonic())

    def say(self, text: str, *, at_once: bool = True) -> None:
        """Print a line; progress only now and then."""
        if at_once or time.monotonic() - self._told > _PROGRESS_SECONDS:
            self._told = time.monotonic()
            print(text, flush=True)  # noqa: T201 - a report

    def failed(self, where: str, error: BaseException | str) -> None:
        """Note a failure."""
        self.failures += 1
        if isinstance(error, BaseException):
            error = "".join(traceback.format_exception(error))
        self.say(f"FAILED {where}\n{error}")


def nth(run: Run) -> None:
    """Let the n-th call fail, for every n and each failure, as far as the time goes."""
    with stepped():
        calls = nthcall.count_calls(run.seed)
    everything = list(nthcall.failures(calls))
    Random(run.seed).shuffle(everything)
    mine = everything[run.part]
    done: Counter[str] = Counter()

    def report(failure: nthcall.Failure, text: str) -> bool:
        name = calls[failure.nth - 1]
        if text:
            run.failed(f"seed {run.seed}, {failure} ({name})", text)
        done[name] += 1
        run.say(f"nth: {run.skip + done.total()} of {len(mine)}", at_once=False)
        return run.goes_on()

    for start in range(run.skip, len(mine), _FAILURES_PER_RUN):
        if run.goes_on():
            nthcall.explore(run.seed, mine[start : start + _FAILURES_PER_RUN], report)
    run.say(
        f"nth: {done.total()} of {len(everything)} failures of {len(calls)} calls, "
        f"{run.failures} failed; {dict(done.most_common())}"
    )


def sequence(run: Run) -> None:
    """Look at every crash point of every sequence, as far as the time goes."""
    base = sequences.make_base()
    tally = sequences.Tally()
    for each in sequences.all_sequences()[run.part][run.skip :]:
        if not run.goes_on():
            break
        try:
            sequences.check(base, each, run.seed, tally)
        except AssertionError as error:
            run.failed(" ".join(each), error)
        run.say(f"sequences: {tally.sequences}, {tally.opened} states opened", at_once=False)
    run.say(
        f"sequences: {tally.sequences}, {tally.points} crash points, {tally.images} states, "
        f"{tally.opened} different ones opened, {run.failures} failed"
    )


def simulation(run: Run) -> None:
    """Run simulated worlds, seed after seed."""
    done: Counter[str] = Counter()
    worlds = views = 0
    for seed in range(run.seed * 1_000_000, run.seed * 1_000_000 + run.worlds)[run.part]:
        if not run.goes_on():
            break
        try:
            world = simulate(seed)
        except Exception as error:  # noqa: BLE001 - reported
            run.failed(f"seed {seed} (simulate({seed}) in tests.faults.simworld)", error)
        else:
            done += world.done
            views += world.model.views
        worlds += 1
        run.say(f"simulation: {worlds} of {run.worlds}", at_once=False)
    faults = {name.removeprefix("chaos "): n for name, n in done.items() if "chaos" in name}
    calls = sum(n for name, n in done.items() if "chaos" not in name and name != "conflicts")
    run.say(
        f"simulation: {worlds} worlds, {calls} calls, {views} views compared, "
        f"{done['conflicts']} conflict records, {run.failures} failed; faults: {faults}"
    )


def kills(run: Run) -> None:
    """Kill workers at named points and at random times."""
    with tempfile.TemporaryDirectory(dir=run.directory) as scratch:
        nursery = Nursery()
        killer = Kills(nursery, Path(scratch) / "state", run.seed)
        try:
            while killer.total < run.kills and run.goes_on():
                killer.run(min(50, run.kills - killer.total), run.goes_on)
                run.say(f"kills: {killer.total}", at_once=False)
            asyncio.run(killer.check(Path(scratch)))
        except AssertionError as error:
            run.failed(f"seed {run.seed}, after {killer.total} kills", error)
        finally:
            nursery.close()
        least = min(killer.at[point] for point in POINTS)
        run.say(
            f"kills: {killer.total}, {killer.at.total()} of them at {len(killer.at)} points (each "
            f"at least {least} times), {killer.acknowledged} acknowledged updates, "
            f"{run.failures} failed"
        )


def soak(run: Run) -> None:
    """Let workers work, killed every 30 seconds, and see that none of them grows."""
    nursery = Nursery()
    with tempfile.TemporaryDirectory(dir=run.directory) as scratch:
        soaking = Soak(nursery, Path(scratch) / "state", run.seed)
        try:
            while run.goes_on():
                soaking.one(min(30.0, run.left()))
                run.say(f"soak: {soaking.lives} lives", at_once=False)
            asyncio.run(soaking.check(Path(scratch)))
        except AssertionError as error:
            run.failed(f"seed {run.seed}, life {soaking.lives}", error)
        finally:
            nursery.close()
        run.say(f"soak: {soaking}, {run.failures} failed")


def cuts(run: Run) -> None:
    """Cut the power of a loop-mounted ext4 under a worker."""
    nursery = Nursery()
    try:
        with tempfile.TemporaryDirectory() as scratch, ext4(Path(scratch)) as disk:
            cutter = PowerCuts(nursery, disk, run.seed)
            try:
                while cutter.cuts < run.kills and run.goes_on():
                    cutter.one()
                    run.say(f"cuts: {cutter.cuts}", at_once=False)
            except AssertionError as error:
                run.failed(f"seed {run.seed}, cut {cutter.cuts}", error)
            run.say(
                f"cuts: {cutter.cuts}, {cutter.acknowledged} acknowledged updates, "
                f"{run.failures} failed"
            )
    except NotHere as why:
        run.say(f"cuts: skipped: {why}")
    finally:
        nursery.close()


def redis(run: Run) -> None:
    """Lose replies; then let servers hang, restart, forget, go back and hold damaged values."""
    try:
        lost, updates = asyncio.run(lose_replies(run.replies, run.seed, run.goes_on))
        run.say(f"redis: {lost} replies lost of {updates} updates, each applied once")
    except AssertionError as error:
        run.failed(f"seed {run.seed}", error)
    happened: Counter[str] = Counter()
    acknowledged = rounds = 0
    while run.goes_on() and rounds < max(1, run.replies // 1000):
        rounds += 1
        for on_outage in ("fail", "local"):
            with tempfile.TemporaryDirectory() as scratch:
                seed = run.seed * 1000 + rounds
                trouble = Trouble(Path(scratch), seed, on_outage)
                try:
                    asyncio.run(trouble.run(12, run.goes_on))
                except AssertionError as error:
                    run.failed(f"seed {seed}, on_outage {on_outage}", error)
                happened += trouble.happened
                acknowledged += trouble.acknowledged
        run.say(f"redis: {rounds} rounds", at_once=False)
    run.say(
        f"redis: {2 * rounds} rounds, {acknowledged} acknowledged updates, "
        f"{run.failures} failed; {dict(happened)}"
    )


def cancels(run: Run) -> None:
    """Cancel calls of Redis at any of their suspensions."""
    try:
        done = asyncio.run(cancel_calls(run.cancels, run.seed, run.goes_on))
        run.say(f"cancels: {done} calls cancelled, no reply reached another one")
    except AssertionError as error:
        run.failed(f"seed {run.seed}", error)


def damage(run: Run) -> None:
    """Put several wrong bytes into a log, again and again."""
    damaged = Damages(run.seed)
    try:
        while damaged.done.total() < run.damages and run.goes_on():
            damaged.run(min(10_000, run.damages - damaged.done.total()))
            run.say(f"damages: {damaged.done.total()}", at_once=False)
    except AssertionError as error:
        run.failed(f"seed {run.seed}", error)
    run.say(
        f"damages: {damaged.done.total()}, {run.failures} not noticed; "
        f"{dict(damaged.done.most_common())}"
    )


def memory(run: Run) -> None:
    """Let the n-th allocation of every operation fail."""
    endings: Counter[str] = Counter()
    for name in nomemory.OPERATIONS:
        try:
            endings.update(nomemory.attempts(name, run.part, run.goes_on))
        except nomemory.Wrong as error:
            run.failed(name, error)
        run.say(f"memory: {endings.total()}, {name}", at_once=False)
    run.say(
        f"memory: {endings.total()} failed allocations, {run.failures} failed; "
        f"{dict(endings.most_common())}"
    )


def fuzz(run: Run) -> None:
    """Feed hostile bytes to every decoder, for an equal part of the time each."""
    names = [name for name in fuzzing.TARGETS if run.only in name][run.part]
    how = "guided by coverage" if fuzzing.is_guided() else "by chance: atheris is not installed"
    run.say(f"fuzz: {how}")
    total = 0
    for name in names:
        count, problem = fuzzing.run_one(name, run.seconds / len(names), run.seed)
        total += count
        run.say(f"fuzz: {name}: {count} inputs")
        if problem:
            run.failed(f"fuzz {name}, seed {run.seed}", AssertionError(problem))
    run.say(f"fuzz: {total} inputs, {len(names)} decoders, {run.failures} failed")


def mutated(run: Run) -> None:
    """Let the tests kill every mutant."""
    survivors = mutants.run_all(run.say, run.goes_on, run.only, run.part)
    run.failures += len(survivors)


SUITES: dict[str, Callable[[Run], None]] = {
    "nth": nth,
    "sequences": sequence,
    "simulation": simulation,
    "kills": kills,
    "soak": soak,
    "cuts": cuts,
    "redis": redis,
    "cancels": cancels,
    "damages": damage,
    "memory": memory,
    "fuzz": fuzz,
    "mutants": mutated,
}


def main() -> int:
    """Run what was asked for; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="default: all")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all suites together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10_000, help="SIGKILLs, or power cuts")
    parser.add_argument("--replies", type=int, default=10_000, help="replies of Redis to lose")
    parser.add_argument("--worlds", type=int, default=1_000_000, help="simulated worlds")
    parser.add_argument("--cancels", type=int, default=100_000, help="calls of Redis to cancel")
    parser.add_argument("--damages", type=int, default=10_000_000, help="damages of a log")
    parser.add_argument("--part", default="1/1", help="2/3: the second of every three")
    parser.add_argument("--skip", type=int, default=0, help="of the part: what was done before")
    parser.add_argument("--only", default="", help="mutants or decoders whose name contains this")
    parser.add_argument("--directory", help="where the kills write; default: a temporary one")
    arguments = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of strings must have the same order again
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        command = [sys.executable, "-m", "tests.faults", *sys.argv[1:]]
        os.execve(sys.executable, command, environment)
    logging.disable(logging.CRITICAL)
    names = arguments.suites or list(SUITES)
    failures = 0
    for number, name in enumerate(names):
        left = arguments.seconds * (1 / len(names))
        run = Run(arguments, left)
        run.say(f"{name}: seed {arguments.seed}, at most {left:.0f} s ({number + 1}/{len(names)})")
        SUITES[name](run)
        failures += run.failures
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
