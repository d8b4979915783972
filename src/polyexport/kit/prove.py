"""The program of a kit: verifies an artifact on the machine that it is made for, and writes `proof.json`.

    python prove.pyz [--threads N]

Requirements:
* Only the standard library, numpy and the artifact's own runtime are there; Python may be 3.10.
* It verifies by the same code as a worker: the kit has the modules that this file imports, unchanged.
* Only what is identical to the export is run: hashes are checked first.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from polyexport.errors import BadRequest, PolyexportError, line
from polyexport.format import Format
from polyexport.formats import known
from polyexport.measure.latency import SECONDS, Latency, sample_ms, summarize, timed_ms, warm_up
from polyexport.measure.verification import fingerprint, sha256, verified
from polyexport.report.folders import DESCRIPTION
from polyexport.report.outcome import Checkpoint, Proof
from polyexport.report.tables import error, milliseconds
from polyexport.serialization import read_record, write_json
from polyexport.spec import Arrays, Batch, ExportSpec, read_arrays
from polyexport.versions import machine, versions

KIT, PROOF, PROGRAM = "kit.json", "proof.json", "prove.pyz"
VERSION = 1
"""Version of the form of `kit.json` and `proof.json`."""


@dataclass(frozen=True, slots=True)
class Kit:
    """What to verify; paths are relative to the kit's folder, and the same as in the export.

    Attributes:
        format: The format's name.
        artifact: The artifact's path.
        sha256: Hash of the artifact's folder, as `Artifact.sha256`.
        checkpoint: The checkpoint of the weights.
        spec: The artifact's signature under PyTorch's names.
        batches: Inputs with PyTorch's outputs, the validation batch first.
        noise: File with the noise floor of the validation batch; empty if it is unknown.
        data: SHA-256 of each file of batches and noise, by path.
        version: The version of this record's form.
    """

    format: str
    artifact: str
    sha256: str
    checkpoint: Checkpoint
    spec: ExportSpec
    batches: tuple[Batch, ...]
    noise: str
    data: Mapping[str, str]
    version: int = VERSION


def main(folder: Path) -> int:
    """Verify the kit in `folder`; the exit code is 0 if the artifact agrees with PyTorch."""
    parser = argparse.ArgumentParser(prog=f"python {PROGRAM}", description="Run and time the artifact of this kit.")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="threads of the runtime; by default one per core"
    )
    threads = parser.parse_args().threads
    faulthandler.enable()  # a runtime that the processor or its emulator cannot run ends by a signal, without a word
    each, kit = None, None
    try:
        kit = read_record(Kit, folder / KIT, VERSION)
        each = known()[kit.format]
        proof = prove(folder, kit, each, threads)
    except ModuleNotFoundError as error:
        packages = " ".join(each.on_device.packages) if each and each.on_device else "numpy"
        print(f"{error.name} is not installed: pip install {packages} numpy", file=sys.stderr)
        return 1
    except Exception as error:  # a runtime refuses an artifact with any exception
        what = str(error) if isinstance(error, PolyexportError) else f"the artifact does not run: {line(error)}"
        print(what, file=sys.stderr)
        return 1
    write_json(folder / PROOF, proof)
    print("\n".join(table(proof)))
    return 0 if proof.parity.passed else 1


def prove(folder: Path, kit: Kit, each: Format, threads: int) -> Proof:
    """Run the artifact on every batch, compare, and time it.

    Raises:
        BadRequest: a file of the kit was changed.
        CannotRun: this machine cannot run it.
    """
    artifact = folder / kit.artifact
    _, found = fingerprint(folder / kit.format, DESCRIPTION)
    data = {path: sha256(folder / path) for path in kit.data}
    changed = [kit.artifact] if found != kit.sha256 else [path for path in data if data[path] != kit.data[path]]
    if changed:
        raise BadRequest(f"{changed[0]} was changed after the kit was made: its SHA-256 differs; make the kit again")
    start = time.perf_counter()
    loaded = each.open_on_device(artifact, kit.spec, threads=threads)
    load_seconds = time.perf_counter() - start
    inputs = read_arrays(folder / kit.batches[0].path, kit.spec.input_names)

    def call() -> Arrays:
        return loaded(inputs)

    first_ms = timed_ms(call)
    parity, elsewhere, lost = verified(loaded, folder, kit.batches, kit.spec, each.limits, kit.noise, loaded.others)
    warm_up(call)
    samples_ms = sample_ms(call, count=100, seconds=SECONDS)
    device = loaded.observed().device
    rows = next((array.shape[0] for array in inputs.values() if array.ndim), 1)
    latency: Latency = summarize(
        samples_ms,
        batch=rows,
        threads=threads,
        device=device,
        load_seconds=load_seconds,
        first_ms=first_ms,
        peak_memory_bytes=None,
    )
    runtime = _runtime(each)
    about = f"{machine()}, {device}" if device.partition(" ")[0] != "cpu" else machine()
    return Proof(
        kit.format,
        found,
        data,
        each.limits,
        runtime,
        about,
        replace(parity, verified_by=f"{runtime}, {about}"),
        elsewhere,
        "; ".join(filter(None, [loaded.shortfall, lost])),
        latency,
        loaded.signature,
    )


def _runtime(each: Format) -> str:
    """The runtime's package with its version, if installed as a package; some vendors' runtimes are not."""
    name = each.on_device.packages[0] if each.on_device else each.name
    found = versions((name,)).get(name)
    return f"{name} {found or getattr(import_module(name), '__version__', '')}".strip()


def table(proof: Proof) -> list[str]:
    """The result, line by line."""
    rows = [("output", "max error", "elements off", "cosine")]
    for name, output in proof.parity.outputs.items():
        cosine = "" if output.cosine is None else f"{output.cosine:.6f}"
        rows.append((name, error(output.max_abs_error), f"{output.misses:.3%}", cosine))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    agrees = f"does not agree with PyTorch: {proof.parity.reason}"
    if proof.parity.passed:
        lost = "; ".join(filter(None, [proof.elsewhere, proof.shortfall]))
        agrees = "agrees with PyTorch" + (f", but {lost}" if lost else "")
    latency = proof.latency
    return [
        f"{proof.format} {agrees}",
        f"on {proof.verified_by}",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        f"p50 {milliseconds(latency.p50_ms)} ms, p95 {milliseconds(latency.p95_ms)} ms, batch {latency.batch}, "
        f"{latency.threads} threads",
        f"wrote {PROOF}",
    ]
