"""What a run says while it runs: a progress bar on a terminal, plain lines elsewhere, and how fast it goes."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import jax
import numpy as np
from tqdm import tqdm

from dit_jax import processes
from dit_jax.data.cache.parts import Unit
from dit_jax.training.writer import Writer


class Beginning:
    """How long it takes from the command to the first step, and where that time goes.

    Args:
      begin: when the command was given, on the clock of `time.monotonic`.
    """

    def __init__(self, begin: float):
        self._begin = self._last = begin
        self._parts: dict[str, float] = {}

    def done(self, part: str) -> None:
        """What took the time since the last part."""
        now = time.monotonic()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self._parts.items())
        return f"first step after {self._last - self._begin:.1f} s: {parts}"


class Progress:
    """Rows and log lines of a run, with speeds measured between them.

    Args:
      writer: where the rows go.
      log_every: steps between rows; a row is written at step 1 and at the last step too. 0 writes those two.
      start: the step that this process starts from.
      total_steps: of the run.
      batch_size: pictures a step.
      flops: of one training picture.
      peak: FLOP/s that all devices together can do, or None where it is not known.
      beginning: of this process, which is told when its first step is done.
    """

    def __init__(
        self,
        writer: Writer,
        log_every: int,
        start: int,
        total_steps: int,
        batch_size: int,
        flops: int,
        peak: float | None,
        beginning: Beginning | None = None,
    ):
        self._writer, self._log_every, self._total, self._batch_size = writer, log_every, total_steps, batch_size
        self._flops, self._peak = flops, peak
        self._bar = tqdm(
            total=total_steps,
            initial=start,
            unit="step",
            disable=not shows_bars(),
            dynamic_ncols=True,
        )
        self._late: tuple[int, dict[str, jax.Array]] | None = None
        self._beginning = beginning
        self._last_step = start
        self._since = time.monotonic()
        self._waited = self._aside = self._trained = 0.0
        self.skipped_in_a_row = 0

    def restart(self) -> None:
        """Measure from now: what came before was not training."""
        self._since, self._waited, self._aside = time.monotonic(), 0.0, 0.0

    @property
    def productive(self) -> float:
        """Seconds of this process in training steps: without waiting for data, and without what is done aside."""
        return self._trained + time.monotonic() - self._since - self._waited - self._aside

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in which the step waits for data."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is not training: sampling, saving."""
        self.flush()
        begin = time.monotonic()
        yield
        self._aside += time.monotonic() - begin
        if self._beginning is not None:
            self._beginning.done("samples and validation")  # which an earlier process owed

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """A step was dispatched. What came of the one before is looked at now, so that the device never waits."""
        self.flush()
        self._bar.update()
        self._late = (step, metrics)

    def flush(self) -> None:
        """Look at what came of the last step, if nobody has: wait for it, and write its row if it has one."""
        if self._late is None:
            return
        (step, metrics), self._late = self._late, None
        in_a_row = int(metrics["skipped_in_a_row"])
        if self._beginning is not None:
            self._beginning.done("step")
            self.say(str(self._beginning))
            self._beginning = None
        if in_a_row > self.skipped_in_a_row:
            self.say(f"warning: step {step} is skipped: {describe_bad(metrics)}; {in_a_row} in a row")
        self.skipped_in_a_row = in_a_row
        if step in (1, self._total) or (self._log_every and step % self._log_every == 0):
            self._write_row(step, {name: np.asarray(value).item() for name, value in metrics.items()})

    def _write_row(self, step: int, row: dict[str, float]) -> None:
        now = time.monotonic()
        seconds = max(now - self._since - self._aside, 1e-9)
        steps = step - self._last_step
        rate = steps * self._batch_size / seconds
        timing = {
            "images_per_second": rate,
            "data_wait": self._waited / seconds,
            "memory_gib": memory_in_use() / 2**30,
        }
        if self._peak:
            timing["mfu"] = rate * self._flops / self._peak
        self._writer.metrics(step, row)
        self._writer.timing(step, timing)
        eta = (self._total - step) * seconds / max(steps, 1)
        mfu = f" mfu={timing['mfu']:.0%}" if self._peak else ""
        scale = f" loss_scale={row['loss_scale']:.0f}" if "loss_scale" in row else ""
        skipped = f" skipped={row['skipped']}" if row["skipped"] else ""
        digits = 0 if rate >= 10 else 1
        self.say(
            f"step={step}/{self._total} loss={row['loss']:.4f} gnorm={row['grad_norm']:.2f}"
            f" lr={row['learning_rate']:.1e}{scale}{skipped} img/s={rate:.{digits}f}"
            f" data_wait={timing['data_wait']:.0%}{mfu} mem={timing['memory_gib']:.1f}GiB eta={duration(eta)}"
        )
        self._last_step = step
        self._trained += seconds - self._waited
        self.restart()

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self.flush()
        self._bar.close()


class Counter:
    """How far a long piece of work is, and when the rest will be done: a bar on a terminal, else a line now and then.

    Args:
      done: what was done, in a word, e.g. ``encoded``.
      noun: of what there are ``total``.
      total: how many there are.
      every: seconds between two lines.
    """

    def __init__(self, done: str, noun: str, total: int, every: float):
        self._words, self._total, self._every = (done, noun), total, every
        self._bar = tqdm(total=total, desc=done, unit=f" {noun}", disable=not shows_bars(), dynamic_ncols=True)
        self._begin = self._said = time.monotonic()
        self._count = 0

    def add(self, count: int) -> None:
        """So many more are done."""
        self._count += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and self._count < self._total and now - self._said >= self._every:
            self._said = now
            left = (now - self._begin) / self._count * (self._total - self._count)
            done, noun = self._words
            print(f"{done} {self._count:,} of {self._total:,} {noun}, {duration(left)} left", flush=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


class EncodingCounter:
    """How far the encoding of a data set is: a `Counter` of pictures, then one of captions.

    Args:
      units: the shards that are to be encoded.
      every: seconds between two lines.
    """

    def __init__(self, units: Iterable[Unit], every: float):
        self._totals = {"pictures": 0, "texts": 0}
        for unit in units:
            self._totals[unit.kind] += len(unit)
        self._every = every
        self._counters: dict[str, Counter] = {}

    def told(self, unit: Unit, count: int) -> None:
        """So many more captions or pictures of a shard are encoded."""
        if unit.kind not in self._counters:
            noun = {"pictures": "pictures", "texts": "captions"}[unit.kind]
            self._counters[unit.kind] = Counter("encoded", noun, self._totals[unit.kind], self._every)
        self._counters[unit.kind].add(count)

    def close(self) -> None:
        """Take the bars away."""
        for counter in self._counters.values():
            counter.close()


def shows_bars() -> bool:
    """Whether somebody watches: on a terminal or in a notebook; of several processes, the first."""
    in_notebook = "ipykernel.kernelapp" in sys.modules  # a program that starts kernels has imported ipykernel too
    return processes.is_first() and (in_notebook or sys.stderr.isatty())


def describe_bad(metrics: Mapping[str, float | jax.Array]) -> str:
    """What is not finite of a step: its loss, or the norm of its gradient."""
    found = {"loss": metrics["loss"], "gradient's norm": metrics["grad_norm"]}
    name = next(name for name, value in found.items() if not np.isfinite(np.asarray(value)))
    return f"the {name} is {float(found[name])}"


def duration(seconds: float) -> str:
    """Seconds as ``3h12m``, ``4m05s`` or ``7s``."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"


def memory_in_use() -> int:
    """Peak bytes in use on the first device; on CPU, of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
