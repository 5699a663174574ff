"""`python -m infer submit`: a submission by tables at once, and by images as soon as they are done.

Whatever fails or takes too long, the submission that is there stays: each is written whole, and
replaced only by one of a better candidate.
"""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from infer.embedding.embed import embed_splits
from infer.embedding.progress import Progress
from infer.embedding.settings import EmbedSettings
from infer.ensemble.blends.artifact import (
    Scorer,
    ensembles_of,
    needed_part,
    networks_of,
    out_of_fold,
)
from infer.ensemble.blends.ranks import Scores, to_scale_of
from infer.ensemble.boosting.refit import Rows, choose_rows
from infer.ensemble.predict import (
    TestTable,
    drift_of,
    read_test_table,
    refuse_foreign_submission,
    warn_of_drift,
    write_submission,
)
from infer.ensemble.score_table import TableScores, score_table
from infer.ensemble.settings import EmbeddingSources
from infer.submission.candidates import Candidate, best
from infer.submission.contents import Bundle, PackedNetwork, open_bundle
from infer.submission.deadline import end_process, ended_at
from infer.submission.devices import Engine, choose_engine
from infer.submission.settings import SubmitSettings
from isic import schema
from isic.dataset import Dataset
from isic.layout import ALL, ERRORS_FILE, find_embeddings
from isic.runtime.errors import DiskError, UserError, collect_warnings, first_line, warn
from isic.runtime.files import digest, read_manifest, remove_folder
from isic.runtime.interrupt import Interrupted, interruptible
from isic.runtime.only_writer import only_writer
from isic.runtime.progress import duration
from isic.tables import read_parquet

DEPTH = 3
"""Levels of folders below the input in which a dataset is looked for."""
TABLES = ("test-metadata.csv", "test-metadata.parquet")
SECONDS_TO_TIME = 20.0
"""Time after which the speed of an embedding run is taken for steady."""
RESERVE = 3.0
"""Time to keep for scoring with images, at least, as a multiple of that without."""

GRACE = 300.0
"""Seconds after the time limit at which a step that has not ended is taken to hang."""
SMALL_BATCH = 32
"""Images per call of the engine if the usual number does not fit a GPU's memory."""


class OutOfTime(Exception):
    """A network would not end within the time limit."""


@dataclass(frozen=True)
class Clock:
    """The time limit of a run."""

    hours: float | None
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def seconds_left(self) -> float:
        return float("inf") if self.hours is None else 3600 * self.hours - self.seconds


def submit(settings: SubmitSettings) -> int:
    """Run `infer submit`, which its settings describe. Return the exit code."""
    clock = Clock(settings.hours)
    try:
        with interruptible(), only_writer(settings.output):
            bundle = open_bundle(settings.bundle)
            test = read_test_table(Dataset(settings.data or find_data(settings.input)))
            refuse_foreign_submission(settings.output)
            run = Run(settings, bundle, test, clock)
            with ended_at(clock.seconds_left + GRACE, run.give_up):
                run.submit()
    except Interrupted as stop:
        print(
            f"stopped by {stop}; a submission that is there stays, and the same command resumes",
            file=sys.stderr,
        )
        return stop.exit_code
    return 0


def find_data(parent: Path) -> Path:
    """Return the only folder below `parent` that has a test table. Raise UserError."""
    found = sorted(
        {
            path.parent
            for depth in range(DEPTH + 1)
            for name in TABLES
            for path in parent.glob("/".join(["*"] * depth + [name]))
        }
    )
    if not found:
        raise UserError(f"no folder in {parent} has a test table ({TABLES[0]}); give --data")
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise UserError(f"several folders in {parent} have a test table ({names}); give --data")
    return found[0]


def _message(error: Exception) -> str:
    if isinstance(error, UserError | OutOfTime):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"


@dataclass
class Run:
    """A submission in progress."""

    settings: SubmitSettings
    bundle: Bundle
    test: TestTable
    clock: Clock
    embedded: dict[str, Path] = field(default_factory=dict)
    """The embeddings of the networks that are done."""
    lost: dict[str, str] = field(default_factory=dict)
    """Why other networks are left out."""
    drift: pl.DataFrame | None = None
    """How the rows of the last submission written differ from those of training."""
    warned: set[str] = field(default_factory=set)
    """Warnings that were printed; every candidate scores the same rows."""
    step: str = "the start"
    """The part of the work that is in progress."""

    def submit(self) -> None:
        """Write the submission, at first without images."""
        first = self.bundle.candidates[0]
        written = self._earlier()
        is_earlier = written is not None
        if written is None:
            written = self._fallback
            self._write(written)
        else:  # for the time that it takes
            assert self._without_images
        reserve = self._reserve()
        for network in self.bundle.networks.values():
            self._embed(network, reserve)
            found = best(self.bundle.candidates, self.embedded)
            # An earlier submission is replaced by the same candidate too: images may have changed.
            is_new = is_earlier or found != written
            is_no_worse = found in {first, written} or found.pauc > written.pauc
            if is_new and is_no_worse and self._can_write(found):
                written, is_earlier = found, False
        self._summarise(written)
        if not self.settings.keep:
            self._remove([self._run_dir])

    def give_up(self) -> None:
        """End the process, with success if there is a submission, although a step has not ended."""
        code = 2
        try:
            written = self._earlier()
            if written is not None and not self.settings.strict:
                code = 0
            result = "there is no submission; give more --hours"
            if written is not None:
                result = f"the submission by {written} stays"
            print(
                f"{'error' if code else 'warning'}: --hours {self.settings.hours} are over and "
                f"{self.step} has not ended; {result}",
                file=sys.stderr,
            )
        finally:
            end_process(code)

    def _reserve(self) -> float:
        """Return the seconds to keep for scoring with images, by those that it took without."""
        first, fallback = self.bundle.candidates[0], self._fallback
        growth = first.num_boosters / max(1, fallback.num_boosters)
        return self.clock.seconds * max(RESERVE, growth)

    @property
    def _work(self) -> Path:
        output = self.settings.output
        return self.settings.work or output.absolute().with_name(f"{output.stem}_work")

    @property
    def _run_dir(self) -> Path:
        """The part of the work folder that is this run's own; the rest may be somebody else's."""
        return self._work / self._key

    @cached_property
    def _key(self) -> str:
        """Identifies the bundle and the table."""
        return digest(self.bundle.digest, self.test.sha256)

    @property
    def _fallback(self) -> Candidate:
        return best(self.bundle.candidates, ())

    def _earlier(self) -> Candidate | None:
        """Return the candidate of a submission of the same inputs that a killed run has written."""
        try:
            facts = read_manifest(self.settings.output).get("bundle", {})
        except UserError:  # none, or the run was killed after the manifest
            return None
        if facts.get("inputs") != self._key:
            return None
        named = {str(candidate): candidate for candidate in self.bundle.candidates}
        return named.get(facts["candidate"])

    def _embed(self, network: PackedNetwork, reserve: float) -> None:
        """Embed the test images with a network; if that fails, note why."""
        self.step = f"the embedding with {network.name}"
        try:
            self.embedded[network.name] = self._embeddings(network, reserve)
        except Exception as error:  # none of any type may end a run whose submission is there
            self.lost[network.name] = _message(error)
            self._complain(f"{network.name} is left out: {_message(error)}", error)
            self._free_disk(network, self._run_dir.glob("*"))

    def _embeddings(self, network: PackedNetwork, reserve: float) -> Path:
        """Embed the test images with a network. Return the folder of the embeddings."""
        self._seconds_left(reserve)
        run = self.bundle.run_dir(network)
        engine, problems = choose_engine(network, run, self.settings.device)
        if problems and self.bundle.expects_gpu:
            self._complain(f"{network.name} runs on no GPU ({'; '.join(problems)})")
        print(f"{network.name}: {engine}", flush=True)
        try:
            return self._run_engine(network, run, engine, None, reserve)
        except UserError as error:
            if engine.device == "cpu" or isinstance(error, DiskError):
                raise
            # The trial had two images and one fold, which need less of the GPU's memory.
            print(f"{engine}: {error}; trying batches of {SMALL_BATCH}", flush=True)
        self._free_disk(network, [self._try_dir(engine, None)])
        try:
            return self._run_engine(network, run, engine, SMALL_BATCH, reserve)
        except UserError as error:
            if self.settings.device == "cuda" or isinstance(error, DiskError):
                raise
            self._complain(f"{network.name} fails on the GPU ({error}); trying the CPU", error)
        self._free_disk(network, [self._try_dir(engine, SMALL_BATCH)])
        on_cpu, _ = choose_engine(network, run, "cpu")
        return self._run_engine(network, run, on_cpu, None, reserve)

    def _try_dir(self, engine: Engine, batch_size: int | None) -> Path:
        return self._run_dir / digest(engine, batch_size)

    def _free_disk(self, network: PackedNetwork, tries: Iterable[Path]) -> None:
        """Remove the embeddings of tries that have failed: the next one needs the space."""
        if not self.settings.keep:
            name = find_embeddings(Path(), network.name, network.fold)
            self._remove(folder / name for folder in tries)

    def _run_engine(
        self,
        network: PackedNetwork,
        run: Path,
        engine: Engine,
        batch_size: int | None,
        reserve: float,
    ) -> Path:
        output_dir = self._try_dir(engine, batch_size)
        settings = EmbedSettings(
            config=network.name,
            data=self.test.dataset.root,
            model_dir=run,
            output_dir=output_dir,
            split="test",
            fold=ALL if network.fold == ALL else None,
            tta=network.tta,
            format=engine.format,
            precision=engine.precision,
            device=engine.device,
            batch_size=batch_size,
            num_processes=engine.num_processes,
            num_threads=self.settings.num_threads,
            on_error="raise" if self.settings.strict else "skip",
            max_bad=1.0,
            quiet=self.settings.quiet,
            # As much as the bundle's own code, which runs already.
            trust=True,
        )
        embed_splits(settings, lambda progress: self._watch(progress, reserve))
        return find_embeddings(output_dir, network.name, network.fold)

    def _watch(self, progress: Progress, reserve: float) -> None:
        """Raise OutOfTime if a network is not done in time at its speed so far."""
        left = self._seconds_left(reserve)
        if progress.timed_seconds > SECONDS_TO_TIME and progress.seconds_left > left:
            raise OutOfTime(
                f"{duration(progress.seconds_left)} more are needed, and {duration(left)} "
                f"of --hours {self.settings.hours} are left"
            )

    def _seconds_left(self, reserve: float) -> float:
        """Return the time that networks may still take. Raise OutOfTime if there is none."""
        left = self.clock.seconds_left - reserve
        if left < 0:
            raise OutOfTime(f"--hours {self.settings.hours} are over but for the time to score")
        return left

    def _complain(self, problem: str, cause: Exception | None = None) -> None:
        """Warn of a loss, or with `--strict` raise UserError."""
        if self.settings.strict:
            raise UserError(f"{problem}; leave --strict out to submit without it") from cause
        warn(problem)

    def _can_write(self, candidate: Candidate) -> bool:
        """Write the submission of a candidate. Return False if it fails, with a warning."""
        try:
            self._write(candidate)
        except Exception as error:  # as in _embed
            self._complain(f"no submission by {candidate}: {_message(error)}", error)
            return False
        return True

    def _remove(self, folders: Iterable[Path]) -> None:
        """Remove folders of this run, and the work folder if nothing else is in it."""
        for folder in folders:
            remove_folder(folder)
        with contextlib.suppress(OSError):
            self._work.rmdir()

    def _write(self, candidate: Candidate) -> None:
        scorer, found = (
            self._without_images if candidate == self._fallback else self._score(candidate)
        )
        lost_rows = self._bad_rows(candidate)
        if lost_rows.any():
            others = self._fallback_on_scale_of(scorer)
            found = found.replaced(lost_rows.to_numpy(), others)
        facts = {
            "sha256": self.bundle.digest,
            "inputs": self._key,
            "candidate": str(candidate),
            "left_out": self.lost,
            "rows_without_image": int(lost_rows.sum()),
        }
        self.drift = self._measure_drift(scorer, found)
        write_submission(
            self.settings.output, self.test, scorer, found, {"bundle": facts}, self.drift
        )
        print(
            f"submission {self.settings.output} after {duration(self.clock.seconds)}: {candidate}",
            flush=True,
        )

    def _measure_drift(self, scorer: Scorer, found: TableScores) -> pl.DataFrame | None:
        """Return the drift from training; None, with a warning, if that fails."""
        try:
            return drift_of(scorer, self.test, found.score, found.own)
        except Exception as error:  # a submission needs no drift
            warn(f"the drift from training is not measured: {_message(error)}")
            return None

    def _score(self, candidate: Candidate) -> tuple[Scorer, TableScores]:
        self.step = f"the scoring by {candidate}"
        found: dict[str, list[Path]] = {"embeddings": [], "frozen": []}
        scorer = self.bundle.open(candidate)
        for name in sorted(networks_of(scorer)):
            found[self.bundle.networks[name].flag].append(self.embedded[name])
        sources = EmbeddingSources(tuple(found["embeddings"]), tuple(found["frozen"]))
        scorer = choose_rows(scorer, self._rows(scorer), sources)
        is_first = candidate == self.bundle.candidates[0]
        with self._warnings_once():
            scores = score_table(
                scorer,
                self.test.metadata,
                sources,
                own_tables={},
                num_threads=self.settings.num_threads or 0,
                few=self.bundle.manifest["few"] if is_first else "warn",
                source=self.test.path,
            )
        return scorer, scores

    @contextlib.contextmanager
    def _warnings_once(self) -> Iterator[None]:
        """Within the block, warnings that were printed before are not printed again."""
        messages: list[str] = []
        try:
            with collect_warnings() as messages:
                yield
        finally:
            for message in messages:
                if message not in self.warned:
                    warn(message)
            self.warned.update(messages)

    def _rows(self, scorer: Scorer) -> Rows:
        """Return the models that score; those of the folds if an ensemble has no others."""
        ensembles = ensembles_of(needed_part(scorer))
        has_refit = all(ensemble.manifest.get("refit") for ensemble in ensembles)
        return "all" if self.bundle.manifest["rows"] == ALL and has_refit else "folds"

    def _bad_rows(self, candidate: Candidate) -> pl.Series:
        """Return [N] whether a network of the candidate could not use the row's image."""
        ids = self.test.metadata[schema.ID]
        bad = pl.Series(np.zeros(len(ids), bool))
        for name in self.embedded.keys() & candidate.networks:
            path = self.embedded[name] / "test" / ERRORS_FILE
            if path.is_file():
                bad |= ids.is_in(read_parquet(path)[schema.ID].implode())
        return bad

    def _fallback_on_scale_of(self, scorer: Scorer) -> Scores:
        """Return [N] the scores without images, as high among an ensemble's own as among theirs."""
        fallback, found = self._without_images
        return to_scale_of(found.score, out_of_fold(fallback), out_of_fold(scorer))

    @cached_property
    def _without_images(self) -> tuple[Scorer, TableScores]:
        return self._score(self._fallback)

    def _summarise(self, written: Candidate) -> None:
        first = self.bundle.candidates[0]
        if written != first:
            lost = f"without {', '.join(self.lost)}" if self.lost else f"by {written}"
            has_curve, keeps_it = map(self.bundle.is_calibrated, (first, written))
            more = ", and there are no probabilities" if has_curve and not keeps_it else ""
            warn(
                f"{lost} the out-of-fold pAUC is {written.pauc:.4f} in place of {first.pauc:.4f} "
                f"({written.pauc - first.pauc:+.4f}){more}"
            )
        bad = int(self._bad_rows(written).sum())
        if bad:
            total = len(self.test.metadata)
            warn(f"{bad:,} of {total:,} rows have no readable image and are scored without images")
        print(f"submission: {self.settings.output} ({len(self.test.metadata):,} rows, {written})")
        if self.drift is not None:
            warn_of_drift(self.drift, self.settings.output)
