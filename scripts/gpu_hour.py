"""The hour that scripts/gpu.py spends on a GPU: its stages, and what it keeps of them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pandas as pd
from hydra import initialize_config_dir
from omegaconf import OmegaConf

import collect
import gpu_report
from bench_common import CONFIGS, composed
from pnorm_decay import records
from pnorm_decay.data import DataError
from pnorm_decay.files import atomic_write, write_text
from pnorm_decay.messages import one_line
from pnorm_decay.training import tracking
from pnorm_decay.training.building import build_data
from pnorm_decay.training.completing import runs_of
from pnorm_decay.training.run import Run
from pnorm_decay.training.settings import ConfigError, Settings

REPOSITORY = CONFIGS.parent
SCALE = "paper"
EXPERIMENTS = ("resnet18_cifar10", "nanogpt_shakespeare")
CASES = dict(zip(EXPERIMENTS, ("resnet18, paper scale", "nanogpt, paper scale"), strict=True))
LIMITS = {"tests": 300.0, "optimizer": 360.0, "training": 420.0}  # seconds, of all slices
# Those that settle most first. Each has a process of its own: a kernel that goes wrong takes what
# follows in its process along.
TESTS = [
    *("training/test_cuda.py", "training/test_waits.py", "optim/test_cuda.py"),
    *("training/test_graphs.py", "optim/test_distributed.py", "training/test_wiring.py"),
    *("optim/test_target.py", "training/test_sharing.py"),
]
TINY = {
    "resnet18_cifar10": [
        "model.width=4",
        "trainer.channels_last=false",
        "trainer.epochs=null",
        "trainer.batch_size=4",
        "schedule.warmup_epochs=null",
        "schedule.warmup_steps=1",
    ],
    "nanogpt_shakespeare": [
        "model.n_layer=1",
        "model.n_head=1",
        "model.n_embd=8",
        "model.block_size=8",
        "trainer.batch_size=2",
        "trainer.val_batch_size=20000",
    ],
}
TINY_STEPS = ["trainer.steps=6", "trainer.eval_every=3"]
ON_CPU = ["trainer.device=cpu", "trainer.threads=1", "trainer.precision=fp32"]
FILES_OF_A_RUN = (records.RESULT_FILE, tracking.METRICS_FILE, tracking.WEIGHTS_FILE)
STATE, LOG, RUNS = "hour.json", "log.txt", "runs.tar.gz"
ROWS = [f"{name}.csv" for name in EXPERIMENTS]
KEPT = (gpu_report.REPORT, STATE, LOG, RUNS, "optimizer.csv", "training.csv", *ROWS)
LOOK_SECONDS = 0.25  # between two looks at what a program is doing
GRACE_SECONDS = 45.0  # a program's, to save its state after it was asked to stop
FINISH_SECONDS = 15.0  # that recording what is there takes at the end
PUBLISH_SECONDS = 15.0  # between two reports while a benchmark runs
DOUBLE_SECONDS = 0.5  # two signals within it are one that came twice
LARGEST = 15 * 2**20  # bytes of a file in gpu/
LEAST_OF_SLICE = 0.9  # with so much of it left, a stage does not wait for the next slice


class Hour:
    """What is done, and what is left, of an hour on a GPU.

    Args:
        folder: where runs/, results/ and gpu/ are; what is in them is gone on with.
        seconds: until it stops.
        workers: runs beside each other; None: as many as the launcher chooses.
        rehearsed: whether everything is tiny and on the CPU.

    Attributes:
        state: gpu/hour.json, what is known beside the rows.
    """

    def __init__(
        self, folder: Path, seconds: float, workers: int | None, *, rehearsed: bool
    ) -> None:
        self.folder, self.workers, self.rehearsed = folder, workers, rehearsed
        self.runs, self.results = folder / "runs", folder / "results"
        self.kept = folder / "gpu"
        self.published = Path(os.environ["OUT"]).resolve() if os.environ.get("OUT") else None
        if self.published is not None and rehearsed:  # what is there may be real
            self.published /= "rehearsal"
        self.deadline = time.monotonic() + seconds
        # Of the time there is, what saving and the report take.
        self.end = self.deadline - min(GRACE_SECONDS + FINISH_SECONDS, seconds / 5)
        self.slice = 0.0  # of it, what was left when the stages began
        self.stopped = False
        self.asked = 0.0  # when it was asked to stop
        self.process: subprocess.Popen[bytes] | None = None
        self.state: dict[str, Any] = {"rehearsed": rehearsed, "hour": [], "environment": []}
        self.state |= {"stages": {}, "sweeps": {}, "errors": {}}

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return 0.0 if self.stopped else max(0.0, self.end - time.monotonic())

    def spend(self, stages: Sequence[str]) -> int:
        """Does what is missing of the stages.

        A stage that fails is told of, and the others are done.

        Returns:
            The exit status: 0, 130 where it was asked to stop, or 2 after an error of a stage.

        Raises:
            ConfigError: gpu/ holds a rehearsal and this is none, or the other way round.
        """
        for folder in (self.kept, self.runs):
            folder.mkdir(parents=True, exist_ok=True)
        self.resume()  # where it refuses, what is there stays as it is
        before = {
            number: signal.signal(number, self.on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        errors = self.state["errors"]
        try:
            self.look_around()
            self.slice = self.left if {"hour", "sweeps"} & set(stages) else 0.0
            do: dict[str, Callable[[], None]] = {
                "tests": self.test,
                "optimizer": self.bench_optimizer,
                "training": self.bench_training,
                "hour": self.train_hour,
                "sweeps": self.sweep,
            }
            for name in stages:
                if self.left:
                    try:
                        do[name]()
                        errors.pop(name, None)
                    except Exception as error:
                        errors[name] = one_line(f"{type(error).__name__}: {error}")
                        self.say(f"failed: {gpu_report.TITLES.get(name, name)}: {errors[name]}")
                    self.publish()
        finally:
            self.publish()
            for number, handler in before.items():
                signal.signal(number, handler)
        self.say(gpu_report.what_is_left(self.state, self.rows()))
        self.say(f"the report: {self.kept / gpu_report.REPORT}")
        return 130 if self.stopped else 2 if errors else 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Asks the program that runs to stop; the second time it is ended at once."""
        again = time.monotonic() - self.asked > DOUBLE_SECONDS
        if self.stopped and again and self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        if not self.stopped:
            self.stopped, self.asked = True, time.monotonic()

    def say(self, text: str) -> None:
        """To the terminal."""
        with contextlib.suppress(OSError):  # nobody reads it any longer
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    # What there is from before, and what is kept.

    def resume(self) -> None:
        """Takes up what an earlier slice left in gpu/ or, where that is empty, in $OUT.

        Cut off anywhere, it begins again: the state comes last, and each file is whole or missing.
        What cannot be read is set aside.
        """
        state = self.kept / STATE
        if not state.exists() and self.published is not None:
            for name in sorted(KEPT, key=STATE.__eq__):
                if (self.published / name).is_file():
                    with atomic_write(self.kept / name) as file:
                        file.write((self.published / name).read_bytes())
        for path in (self.kept / name for name in KEPT):
            with contextlib.suppress(OSError):
                path.chmod(0o644)  # what came back from another machine may be read-only
        before = self.readable(state, lambda path: dict(json.loads(path.read_text("utf-8")))) or {}
        if before.get("rehearsed", self.rehearsed) != self.rehearsed:
            kind = "a rehearsal" if before["rehearsed"] else "results that are no rehearsal's"
            raise ConfigError(f"{self.kept} holds {kind}: choose another folder by --folder")
        self.state |= before
        for name, content in self.readable(self.kept / RUNS, self.packed_runs) or []:
            if not (self.folder / name).exists():
                with atomic_write(self.folder / name) as file:
                    file.write(content)
        for name in EXPERIMENTS:
            rows = self.readable(self.kept / f"{name}.csv", records.read)
            if rows is not None:
                records.write(self.recorded(name), rows)
        for name in ("optimizer", "training"):
            self.readable(self.kept / f"{name}.csv", pd.read_csv)

    def readable(self, path: Path, read: Callable[[Path], Any]) -> Any:
        """What a file holds; None where it is missing or, renamed and told of, broken."""
        if not path.exists():
            return None
        try:
            return read(path)
        except (OSError, EOFError, ValueError, TypeError, tarfile.TarError, zlib.error) as error:
            aside = path.with_name(f"{path.name}.broken")
            path.replace(aside)
            self.say(f"{path} cannot be read and is now {aside.name}: {one_line(error)}")
            return None

    def packed_runs(self, path: Path) -> list[tuple[str, bytes]]:
        """Names and contents of the files of runs in an archive of `pack_runs`."""
        found = []
        with tarfile.open(path) as archive:
            for member in archive:
                member = tarfile.data_filter(member, str(self.folder))
                content = archive.extractfile(member)
                if content is not None:
                    found.append((member.name, content.read()))
        return found

    def recorded(self, name: str) -> Path:
        """An experiment's recorded rows."""
        return self.results / SCALE / f"{name}.csv"

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """The recorded rows of each experiment."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in EXPERIMENTS}
        for name in EXPERIMENTS:
            if self.recorded(name).exists():
                table = records.read(self.recorded(name)).to_dict("records")
                found[name] = [{str(key): value for key, value in row.items()} for row in table]
        return found

    def record(self) -> None:
        """Adds the runs that have ended to the recorded rows, and keeps what they left."""
        collect.console.quiet = True
        _, broken = collect.collect(self.runs, self.results, SCALE)
        for error in broken:
            self.say(f"left out: {error}")
        for name in EXPERIMENTS:
            if self.recorded(name).exists():
                with atomic_write(self.kept / f"{name}.csv") as file:
                    file.write(self.recorded(name).read_bytes())
        self.pack_runs()
        self.publish()

    def pack_runs(self) -> None:
        """What runs left but their weights, in one archive, of which `collect.py` can take them."""
        for files in (FILES_OF_A_RUN, (records.RESULT_FILE,)):
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w:gz") as archive:
                for result in sorted(self.runs.glob(f"{SCALE}/*/*/{records.RESULT_FILE}")):
                    for name in files:
                        path = result.with_name(name)
                        if path.exists():
                            archive.add(path, path.relative_to(self.folder).as_posix())
            if packed.tell() <= LARGEST:
                break
        with atomic_write(self.kept / RUNS) as file:
            file.write(packed.getvalue())

    def publish(self) -> None:
        """Writes the state and the report, and copies what changed to $OUT.

        Where that fails, it is said, and tried again the next time.
        """
        try:
            self._publish()
        except (OSError, ValueError) as error:  # ValueError: a CSV file that is not whole
            self.say(f"not published now: {one_line(str(error))}")

    def _publish(self) -> None:
        log = self.kept / LOG
        if self.process is None and log.exists() and log.stat().st_size > LARGEST:
            with atomic_write(log) as file:
                file.write(log.read_bytes()[-LARGEST // 2 :])
        write_text(self.kept / STATE, json.dumps(self.state, indent=2) + "\n")
        report = gpu_report.report(self.state, self.rows(), self.kept, rehearsed=self.rehearsed)
        write_text(self.kept / gpu_report.REPORT, report)
        if self.published is None or self.published == self.kept:
            return
        self.published.mkdir(parents=True, exist_ok=True)
        for path in (self.kept / name for name in KEPT):
            copy = self.published / path.name
            if path.exists():
                content = path.read_bytes()[-LARGEST:]  # only the log can be larger
                if not copy.exists() or copy.read_bytes() != content:
                    with atomic_write(copy) as file:
                        file.write(content)

    # Programs that do the work.

    def do(
        self,
        command: Sequence[str],
        seconds: float,
        *,
        stop: signal.Signals = signal.SIGTERM,
        look: Callable[[], None] | None = None,
    ) -> int | None:
        """Runs a program, and shows and logs what it says.

        Args:
            command: its command line.
            seconds: after which it is asked to stop, as when this program is.
            stop: the signal that asks it; SIGKILL for what has nothing to save.
            look: called every now and then.

        Returns:
            Its exit status, or None where it was asked to stop.
        """
        words = [sys.executable, *command]
        end = time.monotonic() + min(seconds, self.left)
        path = self.kept / LOG
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
        with path.open("ab") as log, path.open("rb") as reader:
            log.write(f"\n$ python {' '.join(command)}\n".encode())
            log.flush()
            reader.seek(0, os.SEEK_END)
            # A group of its own: Ctrl-C reaches this program alone, which passes it on once.
            self.process = process = subprocess.Popen(
                words,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=REPOSITORY,
                env=environment,
                process_group=0,
            )
            asked = False
            try:
                while process.poll() is None:
                    time.sleep(LOOK_SECONDS)
                    self.show(reader)
                    if look is not None:
                        try:
                            look()
                        except Exception as error:  # the program goes on; the next look may do
                            self.say(f"not recorded now: {one_line(str(error))}")
                    if not asked and (self.stopped or time.monotonic() > end):
                        asked, end = True, time.monotonic() + GRACE_SECONDS
                        if not self.stopped:  # nobody asked; the time is over, or a stage's is
                            end = max(
                                time.monotonic() + 2, min(end, self.deadline - FINISH_SECONDS)
                            )
                        if stop == signal.SIGKILL:
                            os.killpg(process.pid, stop)
                        else:
                            process.send_signal(stop)
                    elif asked and time.monotonic() > end:
                        os.killpg(process.pid, signal.SIGKILL)
                self.show(reader)
            finally:
                self.process = None
                if process.poll() is None:  # an error of this program
                    process.terminate()
                elif asked:  # what a program that was cut off may leave
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        return None if asked else process.returncode

    def show(self, reader: io.BufferedReader) -> None:
        """Shows what came to the log."""
        new = reader.read().decode(errors="replace").rstrip("\n")
        if new:
            self.say(new)

    def due(self, name: str) -> dict[str, Any] | None:
        """What is known of a stage that has a limit; None where it is not to be done now.

        It is done already, or it does not fit into what is left of this slice and can have the
        next one, while runs fill the rest of this.
        """
        entry = self.state["stages"].setdefault(name, {"status": "not begun", "seconds": 0.0})
        needed = LIMITS[name] - entry["seconds"]
        if entry["status"] in ("done", "cut off"):
            return None
        if self.left < min(needed, LEAST_OF_SLICE * self.slice):
            self.say(f"--- {gpu_report.TITLES[name]}: does not fit into the time that is left")
            return None
        self.say(f"--- {gpu_report.TITLES[name]}, {needed / 60:.2g} minutes at most")
        return entry

    def benchmark(self, name: str, command: Sequence[str]) -> None:
        """Runs a program that writes <name>.csv as it goes, unless it is done already."""
        entry = self.due(name)
        if entry is None:
            return
        output = self.kept / f"{name}.csv"
        before = output.read_bytes() if output.exists() else b""
        start, spent = time.monotonic(), entry["seconds"]
        entry["status"] = "interrupted"  # should this program be killed
        self.publish()
        published = start, before

        def look() -> None:
            nonlocal published
            now, rows = time.monotonic(), output.read_bytes() if output.exists() else b""
            entry["seconds"] = spent + now - start
            if rows != published[1] or now - published[0] > PUBLISH_SECONDS:
                published = now, rows
                self.publish()

        left = LIMITS[name] - spent
        at = command.index("--") if "--" in command else len(command)  # overrides follow
        code = self.do([*command[:at], "--output", str(output), *command[at:]], left, look=look)
        entry["seconds"] = spent + time.monotonic() - start
        if code is not None:
            entry["status"] = "done" if code == 0 else f"failed with status {code}"
        elif self.left or entry["seconds"] >= LIMITS[name]:
            entry["status"] = "cut off"
        if (
            code != 0
            and before
            and (not output.exists() or output.read_bytes().count(b"\n") < before.count(b"\n"))
        ):
            with atomic_write(output) as file:  # an earlier try came further
                file.write(before)

    # The stages.

    def look_around(self) -> None:
        """Notes what there is: the GPU, the software, the data."""
        lines = gpu_report.environment()
        self.state["missing_data"] = {}
        for name in EXPERIMENTS:
            told = self.prepared_data(name)
            lines.append(f"{name}: {told}")
        self.state["environment"] = lines
        self.say("\n".join(lines))
        self.publish()

    def prepared_data(self, name: str) -> str:
        """Decodes an experiment's data set; what it is, or why its runs are left out."""
        try:
            settings = Settings.from_config(composed(self.words(name)))
            data: Any = build_data(settings)
            data.prepare()
            return data.label
        except (ConfigError, DataError, ImportError, OSError) as error:
            self.state["missing_data"][name] = str(error)
            return f"its runs are left out: {error}"

    def words(self, name: str, steps: Sequence[str] = TINY_STEPS) -> list[str]:
        """The overrides of every run of an experiment."""
        runs, results = (os.path.relpath(path, REPOSITORY) for path in (self.runs, self.results))
        places = [f"runs_dir={runs}", f"results_dir={results}", "logger=none"]
        words = [f"experiment={SCALE}/{name}", *places]
        if self.rehearsed:
            words += [*TINY[name], *steps, *ON_CPU, f"data.cache_dir={self.folder / 'data'}"]
        return words

    @property
    def able(self) -> list[str]:
        """The experiments whose data are there."""
        return [name for name in EXPERIMENTS if name not in self.state["missing_data"]]

    def test(self) -> None:
        """The tests that are marked `cuda`, file by file; rehearsed, that they can be collected."""
        entry = self.due("tests")
        if entry is None:
            return
        results = entry.setdefault("files", {})
        files = [f"tests/{name}" for name in TESTS]
        groups = [files] if self.rehearsed else [[file] for file in files]
        for number, group in enumerate(groups):
            name, start = " ".join(group), time.monotonic()
            left = LIMITS["tests"] - entry["seconds"]
            if name in results or not left > 0 or not self.left:
                continue
            entry["status"] = "interrupted"  # should this program be killed
            self.publish()
            log = self.kept / LOG
            begun = log.stat().st_size if log.exists() else 0
            # The suite's own options name plugins that may be missing here.
            program = ["-m", "pytest", "-m", "cuda", "-v", "-rfE", "--tb=short"]
            program += ["-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", *group]
            program += ["--collect-only", "-qqq"] if self.rehearsed else []
            # Half of the time at most, so that one that hangs leaves the others theirs.
            share = left if number == len(groups) - 1 else left / 2
            code = self.do(program, share, stop=signal.SIGKILL)
            entry["seconds"] += time.monotonic() - start
            said = log.read_bytes()[begun:].decode(errors="replace")
            found = gpu_report.test_results(said)
            if self.rehearsed:
                found["note"] = said.strip().splitlines()[-1]
            if code is not None or self.left:  # not cut off by the slice's end
                found["note"] += "" if code is not None else "; cut off"
                # 1: some failed; 5: there are none here.
                found["note"] += f"; status {code}" if code not in (None, 0, 1, 5) else ""
                results[name] = found
            self.publish()
        over = all(" ".join(group) in results for group in groups)
        entry["status"] = "done" if over else "interrupted"
        if not over and LIMITS["tests"] <= entry["seconds"]:
            entry["status"] = "cut off"

    def bench_optimizer(self) -> None:
        """A step of every optimizer."""
        tiny = ["--tiny", "--p", "0.8", "--repeats", "1"]
        whole = ["--device", "cuda", "--p", "0.5", "0.8", "1.5"]
        self.benchmark(
            "optimizer", ["scripts/bench_optimizer.py", *(tiny if self.rehearsed else whole)]
        )

    def bench_training(self) -> None:
        """A training step with every optimizer."""
        if not self.able:
            return
        program = ["scripts/bench_training.py"]
        if self.rehearsed:
            name = self.able[0]
            words = self.words(name, ["trainer.steps=100", "trainer.eval_every=100"])
            program += ["--cases", CASES[name], "--optimizers", "--rounds", "1"]
            program += ["--seconds", "0.01", "--"]
            program += [word for word in words if word.startswith(("model", "trainer", "data"))]
        else:
            program += ["--cases", *(CASES[name] for name in self.able), "--device", "cuda"]
            program += ["--rounds", "2", "--seconds", "4"]
        self.benchmark("training", program)

    def train_hour(self) -> None:
        """The runs of `configs/hydra/sweeper/hour.yaml`."""
        lines = list(OmegaConf.load(CONFIGS / "hydra" / "sweeper" / "hour.yaml").runs)
        wanted = []
        known = []
        for line in lines:
            name = line.partition("/")[2].partition(" ")[0]
            if name not in self.able:
                continue
            words = [*line.split(), *self.words(name)[1:]]
            wanted.append(" ".join(words))
            settings = Settings.from_config(composed(words))
            run = Run(settings, build_data(settings))
            known.append({"experiment": name, "run_id": run.id, "name": run.name})
        self.state["hour"] = known
        ended = {
            row["run_id"]
            for rows in self.rows().values()
            for row in rows
            if row["status"] in gpu_report.ENDED
        }
        if {run["run_id"] for run in known} <= ended:
            self.say(f"--- {gpu_report.TITLES['hour']}: all {len(known)} are done")
        else:
            self.say(f"--- {gpu_report.TITLES['hour']}")
            runs = f"hydra.sweeper.runs={json.dumps(wanted)}"
            self.train(["experiments/train.py", "-m", "hydra/sweeper=hour", runs])

    def sweep(self) -> None:
        """The sweeps at paper scale, one kind after the other for both experiments."""
        listed: dict[str, int] = {}
        for name in self.able:
            for sweep in OmegaConf.load(CONFIGS / "experiment" / SCALE / f"{name}.yaml").sweeps:
                count = runs_of_sweep(f"{SCALE}/{name}", sweep)
                listed[f"{name} {sweep}"] = count
        for key, count in listed.items():
            self.state["sweeps"].setdefault(key, {"runs": count, "status": "not done"})
        if self.rehearsed:  # two runs of each experiment show it
            listed = {key: count for key, count in listed.items() if key.endswith(" sgd")}
        for key in sorted(listed, key=lambda key: sweep_order(listed, key)):
            entry = self.state["sweeps"][key]
            if not self.left or entry["status"] == "done":
                continue
            name, sweep = key.split()
            self.say(f"--- sweep={sweep} of {SCALE}/{name}")
            program = ["experiments/sweep.py", SCALE, "--experiments", name, "--sweeps", sweep]
            code = self.train([*program, "--", *self.words(name)[1:]])
            if code is not None:
                entry["status"] = "done" if code == 0 else f"failed with status {code}"

    def train(self, program: list[str]) -> int | None:
        """Runs a program that trains, recording its runs as they end."""
        if self.workers is not None:
            program = [*program, f"hydra.launcher.n_jobs={self.workers}"]
        ended = set(self.runs.glob(f"{SCALE}/*/*/{records.RESULT_FILE}"))

        def look() -> None:
            nonlocal ended
            now = set(self.runs.glob(f"{SCALE}/*/*/{records.RESULT_FILE}"))
            if now != ended:
                ended = now
                self.record()

        code = self.do(program, self.left, look=look)
        self.record()
        return code


def sweep_order(listed: dict[str, int], key: str) -> tuple[int, str]:
    """By the place of a sweep in its experiment's list, so that the experiments take turns."""
    name = key.partition(" ")[0]
    own = [other for other in listed if other.startswith(f"{name} ")]
    return own.index(key), key


def runs_of_sweep(experiment: str, sweep: str) -> int:
    """How many runs a sweep has."""
    words = [f"experiment={experiment}", f"sweep={sweep}", "logger=none"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return len(runs_of(words))
