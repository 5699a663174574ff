"""`python -m benchmarks faults`: attempts of all campaigns in worker processes, resumable."""

import os
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from pkgutil import resolve_name

from benchmarks.faults.attempts import Attempt, Campaign, deal, interleave, scratch_folder
from benchmarks.faults.log import append_log, count_outcomes, read_log
from benchmarks.process import GRACE, terminable
from benchmarks.record import error_text, print_and_append
from benchmarks.settings import ALL, CAMPAIGNS, FaultsSettings
from isic.runtime.errors import UserError, did_you_mean
from isic.runtime.interrupt import block_sigint
from isic.runtime.machine import num_cores
from isic.runtime.only_writer import only_writer

LOG_FILE = "attempts.jsonl"
NOTE_SECONDS = 60.0
"""Time between two lines of progress."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")
"""Variables with the number of threads of libraries."""

Task = tuple[str, str, int]
"""Campaign, target and seed."""


def faults(settings: FaultsSettings) -> int:
    """Run the attempts that are not in the log yet and record all; 1 if one failed."""
    names = chosen(settings.campaign, list(CAMPAIGNS), "--campaign")
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    with only_writer(settings.work_dir):
        return repeat(names, settings) if settings.seed else run_planned(names, settings)


def run_planned(names: Sequence[str], settings: FaultsSettings) -> int:
    """Run the attempts of a whole run that are not in the log yet, and record all."""
    log = settings.work_dir / LOG_FILE
    done = {(each.campaign, each.target, each.seed) for each in read_log(log)}
    tasks = [task for task in planned(names, settings) if task not in done]
    print(f"{len(done)} attempts are in {log}, {len(tasks)} are to do", flush=True)
    for attempt in run_attempts(tasks, settings):
        append_log(log, attempt)
        report_failed(attempt)
    rows = [row for row in count_outcomes(read_log(log)) if row["campaign"] in names]
    if rows:
        print_and_append("faults", rows, settings.results)
    return int(any(row["failed"] for row in rows))


def repeat(names: Sequence[str], settings: FaultsSettings) -> int:
    """Repeat attempts with the given seeds and print them; they are not recorded."""
    targets = [(name, target) for name in names for target in targets_of(name, settings)]
    tasks = [(*target, seed) for target in targets for seed in settings.seed]
    failed = 0
    for attempt in run_attempts(tasks, settings):
        print(f"{attempt.target} {attempt.seed}: {attempt.outcome}: {attempt.detail}", flush=True)
        failed += attempt.outcome == "failed"
    return int(failed > 0)


def planned(names: Sequence[str], settings: FaultsSettings) -> Iterator[Task]:
    """Yield the attempts of a whole run, evenly over the targets of each campaign."""
    dealt = {
        name: list(deal(targets_of(name, settings), settings.attempts or CAMPAIGNS[name][1]))
        for name in names
    }
    return interleave(dealt)


def targets_of(name: str, settings: FaultsSettings) -> Sequence[str]:
    campaign: Campaign = resolve_name(CAMPAIGNS[name][0])()
    return chosen(settings.target, campaign.targets, "--target")


def chosen(words: Sequence[str], known: Sequence[str], flag: str) -> Sequence[str]:
    """Return the known words that were asked for, in their order."""
    for word in words:
        if word not in (*known, ALL):
            raise UserError(f'{flag} knows no "{word}", {did_you_mean(word, known)}')
    return known if ALL in words else [word for word in known if word in words]


def report_failed(attempt: Attempt) -> None:
    if attempt.outcome == "failed":
        command = "python -m benchmarks faults"
        flags = f"--campaign {attempt.campaign} --target {attempt.target} --seed {attempt.seed}"
        print(f"failed: {attempt.detail}\n  repeat it: {command} {flags}", flush=True)


def run_attempts(tasks: Sequence[Task], settings: FaultsSettings) -> Iterator[Attempt]:
    """Run attempts in worker processes until all are done or the time is over.

    Yields:
        Each as it ends. One whose worker died counts as failed.
    """
    if not tasks:
        return
    deadline = time.monotonic() + settings.minutes * 60
    # Absolute, because commands run in folders of their own.
    work_dir = settings.work_dir.resolve()
    with one_thread_each(), Workers(work_dir) as workers:
        prepare_once(tasks, work_dir)
        yield from _deal_out(deque(tasks), workers, settings.num_workers or num_cores(), deadline)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Limit the libraries of new processes to one thread: attempts share the cores."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _deal_out(
    tasks: deque[Task], workers: "Workers", number: int, deadline: float
) -> Iterator[Attempt]:
    """Keep `number` workers busy until the deadline; yield their attempts."""
    total, finished, noted = len(tasks), 0, time.monotonic()
    while True:
        while tasks and len(workers.running) < number and time.monotonic() < deadline:
            workers.submit(tasks.popleft())
        if not workers.running:
            return
        for attempt in workers.wait():
            yield attempt
            finished += 1
        if time.monotonic() > noted + NOTE_SECONDS:
            noted = time.monotonic()
            print(f"{finished} of {total} attempts done", flush=True)


def prepare_once(tasks: Sequence[Task], work_dir: Path) -> None:
    """Prepare each campaign in a process of its own, so that this one stays small."""
    for name in dict.fromkeys(name for name, _, _ in tasks):
        source = CAMPAIGNS[name][0]
        process = get_context("spawn").Process(target=_prepare, args=(source, work_dir))
        process.start()
        process.join()
        if process.exitcode:
            raise UserError(f"the campaign {name} could not be prepared; see the message above")


def _prepare(source: str, work_dir: Path) -> Campaign:
    campaign: Campaign = resolve_name(source)()
    folder = work_dir / campaign.name
    folder.mkdir(exist_ok=True)
    campaign.prepare(folder)
    return campaign


class Workers:
    """Processes that run one attempt at a time each; a context manager that ends them.

    Each serves one campaign: after the threads that another one has started, it could neither fork
    nor mount anything for them.
    """

    def __init__(self, work_dir: Path) -> None:
        self._work_dir = work_dir
        self._idle: defaultdict[str, list[Connection]] = defaultdict(list)
        self._processes: dict[Connection, SpawnProcess] = {}
        self.running: dict[Connection, Task] = {}

    def submit(self, task: Task) -> None:
        """Run an attempt in an idle worker, or in a new one."""
        name, *attempt = task
        idle = self._idle[name]
        pipe = idle.pop() if idle else self._start(name)
        self.running[pipe] = task
        pipe.send(attempt)

    def wait(self, seconds: float = 1.0) -> Iterator[Attempt]:
        """Yield the attempts that end within some seconds."""
        for pipe in connection.wait(list(self.running), seconds):
            assert isinstance(pipe, Connection)
            task = self.running.pop(pipe)
            try:
                yield pipe.recv()
                self._idle[task[0]].append(pipe)
            except (EOFError, ConnectionResetError):
                process = self._processes.pop(pipe)
                process.join()
                _end(process)
                reason = f"the worker died with exit code {process.exitcode}"
                yield Attempt(*task, "failed", reason, 0.0)

    def _start(self, name: str) -> Connection:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        source = CAMPAIGNS[name][0]
        process = context.Process(target=_work, args=(theirs, source, self._work_dir))
        with block_sigint():
            process.start()
        # The child has its own copy; with this one open, the child's end would give no EOF.
        theirs.close()
        self._processes[ours] = process
        return ours

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            _end(process)


def _end(process: SpawnProcess) -> None:
    """Wait for a worker a moment, then kill it and everything that it has left in its session."""
    process.join(GRACE)
    process.kill()
    if process.ident is not None:
        with suppress(ProcessLookupError):
            os.killpg(process.ident, signal.SIGKILL)


def _work(pipe: Connection, source: str, work_dir: Path) -> None:
    # Ctrl-C reaches every process of a terminal's group; the parent ends this one and its children.
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with terminable(), suppress(EOFError, BrokenPipeError):
        campaign = _prepare(source, work_dir)
        while True:
            target, seed = pipe.recv()
            with scratch_folder(
                work_dir / "scratch" / f"{campaign.name}-{target}-{seed}"
            ) as folder:
                pipe.send(run_attempt(campaign, target, seed, folder))


def run_attempt(campaign: Campaign, target: str, seed: int, folder: Path) -> Attempt:
    """Run an attempt; an exception of the campaign itself counts as failed, too."""
    started = time.monotonic()
    try:
        return campaign.attempt(target, seed, folder)
    except Exception as error:  # a fault may surface as any exception
        sys.excepthook(type(error), error, error.__traceback__)
        seconds = time.monotonic() - started
        return Attempt(campaign.name, target, seed, "failed", error_text(error), seconds)
