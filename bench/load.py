"""``fluxkontext bench load``: requests from several callers, and whether they are served in time.

At a rate, they arrive as a Poisson process, whether the ones before are done or not; latency runs
from the *intended* arrival, so that a slow answer does not hide the wait of those behind it. At a
concurrency, so many callers each wait for their answer before they ask again.
"""

import argparse
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from ..runtime import KontextPipeline
from ..runtime.commands.parsing import Parser, count
from ..runtime.errors import InvalidInputError, KontextError, QueueFullError
from .document import Json, distribution, document, result, warning
from .environment import environment, git_state, git_warnings, reader_of
from .measure import FEW, OtherLoad, throughput
from .models import opened
from .nvml import state_warnings
from .options import common, deliver, positive, whole
from .scenarios import SCENARIOS, SUITE, Work, works
from .tables import latency_table
from .threads import threads

Call = Callable[[], float]
"""One request: does it, and returns the seconds that it waited for its turn."""


@dataclass
class Served:
    """What became of the requests. Seconds; queue: from the intended arrival to its turn."""

    latency: list[float] = field(default_factory=list)
    queue: list[float] = field(default_factory=list)
    rejected: int = 0
    wall: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def arrivals(self) -> int:
        return len(self.latency) + self.rejected

    def serve(self, call: Call, intended: float) -> None:
        """One request that was to arrive at ``intended`` (``time.perf_counter()``)."""
        started = time.perf_counter()
        try:
            waited = call()
        except QueueFullError:
            with self._lock:
                self.rejected += 1
            return
        ended = time.perf_counter()
        with self._lock:
            self.latency.append(ended - intended)
            self.queue.append(max(0.0, started - intended) + waited)

    def quantile(self, share: float) -> float:
        """Of the latency of all that arrived; a request that was refused never ends."""
        every = [*self.latency, *[float("inf")] * self.rejected]
        return float(np.percentile(every, 100 * share, method="higher"))


def arrivals(rate: float, duration: float, seed: int) -> list[float]:
    """Seconds from the start at which requests arrive: a Poisson process, at least one."""
    rng = np.random.default_rng(seed)
    times: list[float] = []
    now = 0.0
    while True:
        now += float(rng.exponential(1 / rate))
        if now >= duration and times:
            return times
        times.append(now)


def open_loop(call: Call, times: Sequence[float], callers: int) -> Served:
    """Requests at their times, each from a thread of its own, up to ``callers`` at once."""
    served = Served()
    with ThreadPoolExecutor(callers) as pool:
        start = time.perf_counter()
        futures = []
        for at in times:
            time.sleep(max(0.0, start + at - time.perf_counter()))
            futures.append(pool.submit(served.serve, call, start + at))
        for future in futures:
            future.result()
    served.wall = time.perf_counter() - start
    return served


def closed_loop(call: Call, callers: int, duration: float) -> Served:
    """Callers that ask again when they are answered, until ``duration`` is over."""
    served = Served()
    start = time.perf_counter()

    def caller() -> None:
        while (now := time.perf_counter()) < start + duration:
            served.serve(call, now)

    with ThreadPoolExecutor(callers) as pool:
        for future in [pool.submit(caller) for _ in range(callers)]:
            future.result()
    served.wall = time.perf_counter() - start
    return served


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if the objective was missed."""
    args = _parser().parse_args(argv)
    if (args.rate is None) == (args.concurrency is None):
        raise InvalidInputError("expected --rate or --concurrency, found both or neither")
    others = OtherLoad()
    with threads(args.threads, args.device), opened(args.model) as model:
        with KontextPipeline.from_pretrained(
            model.path,
            backend=args.backend,
            precision=args.precision,
            device=args.device,
            max_queue=args.max_queue,
            memo_entries=0,
        ) as pipe:
            (work,) = works([args.scenario], pipe.grid, [args.steps], [1])
            row, doubts, states = _measured(pipe, work, args)
        git = git_state()
        found = document(
            "load",
            SUITE,
            git=git,
            command=["fluxkontext", "bench", "load", *(sys.argv[1:] if argv is None else argv)],
            model=model.facts,
            environment=environment(row["parameters"]["device"], *states),
            warnings=[*git_warnings(git), *model.warnings, *doubts, *others.warnings()],
            results=[row],
        )
    load = row["load"]
    verdict = f"{load['completed']} of {load['arrivals']} served, {load['rejected']} refused"
    if load["slo_met"] is not None:
        met = "met" if load["slo_met"] else "missed"
        verdict += f"; {load['slo']:g} s at the {load['quantile']:.0%} quantile: {met}"
    deliver(found, args, f"{latency_table(found)}\n{verdict}")
    return 1 if load["slo_met"] is False else 0


def _measured(
    pipe: KontextPipeline, work: Work, args: argparse.Namespace
) -> tuple[Json, list[Json], tuple[Json | None, Json | None]]:
    """The result, the doubts about it, and the GPU's states around it."""
    arguments, reader = work.arguments(), reader_of(pipe.about["device"])
    for _ in range(args.warmup):
        pipe(**arguments)
    before = reader.state() if reader else None
    with tqdm(disable=True if args.quiet else None, unit="edit", leave=False) as bar:

        def call() -> float:
            waited = pipe(**arguments).timings["queue"]
            bar.update()
            return waited

        if args.rate is not None:
            times = arrivals(args.rate, args.duration, args.seed)
            served = open_loop(call, times, args.max_queue + 2)
        else:
            served = closed_loop(call, args.concurrency, args.duration)
    after = reader.state() if reader else None
    if not served.latency:
        raise KontextError(
            "expected a request that is served, found all refused; raise --max-queue"
        )
    pace = f"{args.rate:g} a second" if args.rate else f"{args.concurrency} callers"
    about = pipe.about
    name = f"{work.name}, {about['backend']} {about['precision']}, {pace}"
    row = result(
        name,
        work.scenario,
        work.parameters(pipe),
        warmup=args.warmup,
        latency=distribution(served.latency),
        stages={"queue": distribution(served.queue)},
        throughput=throughput(len(served.latency), served.wall),
        load={
            "rate": args.rate,
            "concurrency": args.concurrency,
            "duration": args.duration,
            "arrivals": served.arrivals,
            "completed": len(served.latency),
            "rejected": served.rejected,
            "slo": args.slo,
            "quantile": args.quantile,
            "slo_met": None if args.slo is None else served.quantile(args.quantile) <= args.slo,
        },
        devices={"before": before, "after": after} if reader else None,
    )
    doubts = state_warnings([before, after], name)
    if served.arrivals < FEW:
        doubts.append(warning("few_samples", f"{served.arrivals} requests", name))
    return row, doubts, (before, after)


def _parser() -> Parser:
    parser = Parser(
        prog="fluxkontext bench load",
        description="Edits for several callers; exit code 1 if they are not served in time.",
        parents=[common()],
    )
    parser.add_argument("--rate", type=positive, help="arrivals a second, as a Poisson process")
    parser.add_argument("--concurrency", type=count, help="callers that wait for their answers")
    parser.add_argument("--duration", type=positive, default=30.0, help="s; default: %(default)g")
    parser.add_argument("--slo", type=positive, metavar="SECONDS", help="the latency to hold")
    parser.add_argument(
        "--quantile", type=_share, default=0.95, help="of the latency; default: %(default)s"
    )
    parser.add_argument("--scenario", choices=list(SCENARIOS), default="edit")
    parser.add_argument("--steps", type=count, default=8, help="default: %(default)s")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--max-queue", type=whole, default=64, help="more are refused")
    parser.add_argument("--warmup", type=whole, default=2, help="edits; default: %(default)s")
    parser.add_argument("--seed", type=whole, default=0, help="of the arrivals")
    return parser


def _share(text: str) -> float:
    value = positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a quantile between 0 and 1, found {text}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
