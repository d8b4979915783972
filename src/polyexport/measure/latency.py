"""Latency of one call. Pure functions over callables and samples; the clock is an argument."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MIN_SAMPLES = 100
ROUNDS = 5

SECONDS = 10.0
"""Time for all calls of one runtime, without loading; the last call may exceed it."""

QUIET = 0.2
"""The greatest median share of time that runtimes may wait for a processor on a machine that counts as idle.

An idle machine with two cores gave 0.03 to 0.08, and one with two busy programs 0.3.
"""


@dataclass(frozen=True, slots=True)
class Latency:
    """Wall-clock time of one call on the validation batch, named numpy arrays in to named numpy arrays out.

    Percentiles are over the raw calls in `samples_ms`, taken in rounds that alternate with the other formats', so that
    a machine that slows down does so for all of them. Slow runtimes have fewer samples; `p99_ms` is None below 100.
    `load_seconds` and `first_ms` are the cold start. `peak_memory_bytes` is the peak resident memory of the process
    that ran the calls. `speedup` is eager PyTorch's median divided by this one, from the same rounds; None if the
    machine was busy. `waited` is the share of time in which the main thread was ready to run but had no processor; 0
    where the system does not report it. `batch_1_p50_ms` is the median of calls with one row, from the same rounds;
    None if `batch` is 1 already, or the artifact does not take one row.
    """

    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float | None
    throughput_per_second: float
    batch: int
    threads: int
    device: str
    load_seconds: float
    first_ms: float
    peak_memory_bytes: int | None
    samples_ms: tuple[float, ...]
    speedup: float | None = None
    batch_1_p50_ms: float | None = None
    waited: float = 0.0

    @property
    def samples(self) -> int:
        """How many calls were timed."""
        return len(self.samples_ms)


def timed_ms(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds of one call."""
    start = clock()
    call()
    return (clock() - start) * 1e3


def warm_up(
    call: Callable[[], object],
    *,
    count: int = 5,
    seconds: float = 0.2,
    at_most: float = SECONDS / ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Call until both `count` calls and `seconds` have passed, or `at_most` seconds; returns the number of calls."""
    start, calls = clock(), 0
    while (calls < count or clock() - start < seconds) and clock() - start < at_most:
        call()
        calls += 1
    return calls


def sample_ms(
    call: Callable[[], object],
    *,
    count: int = MIN_SAMPLES // ROUNDS,
    seconds: float = SECONDS / ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Milliseconds of each of `count` calls, or of those until `seconds` have passed; at least one."""
    samples = [timed_ms(call, clock)]
    while len(samples) < count and sum(samples) < seconds * 1e3:
        samples.append(timed_ms(call, clock))
    return samples


def is_quiet(measured: Iterable[Latency]) -> bool:
    """Whether the machine was idle enough during these measurements to compare them."""
    return waited_by_median(measured) <= QUIET


def waited_by_median(measured: Iterable[Latency]) -> float:
    """Median share of time that the runtimes waited for a processor; 0 if there are none."""
    return statistics.median([latency.waited for latency in measured] or [0.0])


def summarize(
    samples_ms: Sequence[float],
    *,
    batch: int,
    threads: int,
    device: str,
    load_seconds: float,
    first_ms: float,
    peak_memory_bytes: int | None,
    waited: float = 0.0,
    one_row_ms: Sequence[float] = (),
) -> Latency:
    """Percentiles (linear interpolation between the nearest ranks) and throughput of raw samples.

    `one_row_ms` are samples of calls with one row.

    Raises:
        ValueError: there are no samples.
    """
    if not samples_ms:
        raise ValueError("no latency samples")
    p50, p90, p95, p99 = (float(value) for value in np.percentile(samples_ms, [50, 90, 95, 99]))
    return Latency(
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99 if len(samples_ms) >= MIN_SAMPLES else None,
        throughput_per_second=max(batch, 1) * len(samples_ms) * 1e3 / sum(samples_ms),
        batch=batch,
        threads=threads,
        device=device,
        load_seconds=load_seconds,
        first_ms=first_ms,
        peak_memory_bytes=peak_memory_bytes,
        samples_ms=tuple(samples_ms),
        batch_1_p50_ms=statistics.median(one_row_ms) if one_row_ms else None,
        waited=waited,
    )
