"""Where in the model an artifact and PyTorch diverge: both run again, and their layers are compared.

Requirements:
* The export itself is not changed; temporary files are removed.
* It only helps to find a fault: if it fails, the artifact's state and reason stay as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace

from polyexport.engine.dispatch import Dispatcher
from polyexport.engine.rerun import Runnable, recorded, runnables
from polyexport.engine.routes import Watch
from polyexport.errors import BadRequest, CannotRun
from polyexport.format import Format
from polyexport.measure.dynamic_axes import first_rows
from polyexport.measure.layers import Layer, divergence
from polyexport.report.outcome import Outcome
from polyexport.report.report import Report
from polyexport.serialization import decode
from polyexport.spec import write_arrays
from polyexport.workers import toolchain
from polyexport.workers.job import Explain, Inspect, module_of

_ROWS = 4
"""Rows of the validation batch that are compared; all of them where the batch axis is static."""


def layers(report: Report, each: Runnable, dispatcher: Dispatcher) -> tuple[Layer, ...]:
    """The error of each layer of the module in the artifact, and of the outputs, which come last.

    Raises:
        BadRequest: the format has no `intermediates`.
        CannotRun: PyTorch or the artifact does not run.
    """
    if each.format.intermediates is None:
        raise BadRequest(f"{each.name} gives no access to intermediate tensors, so layers cannot be compared")
    folder = f"source/explain-{each.name}"
    batch = f"{folder}/inputs.npz"
    inputs = recorded(report, each.batch, each.spec.input_names)
    try:
        (report.folder / folder).mkdir()
        write_arrays(report.folder / batch, first_rows(inputs, each.spec, _ROWS) or inputs)
        module = module_of(each.batch)
        pytorch = Inspect(source=module, batch=batch, target=folder, trusted=dispatcher.trusted)
        ended = dispatcher.run(pytorch, toolchain.HOST, f"{each.name}.inspect", each.log)
        if ended.ok:
            job = Explain(**each.of_job(dispatcher), batch=batch, layers=folder)
            ended = dispatcher.run(job, each.runtime, f"{each.name}.explain", each.log, gpu=each.format.uses_gpu)
        if not ended.ok:
            raise CannotRun(f"the layers of {each.name} cannot be compared: {ended.error}")
    finally:
        shutil.rmtree(report.folder / folder, ignore_errors=True)
    return tuple(decode(Layer, found) for found in ended.value)


def explained(report: Report, formats: Mapping[str, Format], dispatcher: Dispatcher, watch: Watch) -> Report:
    """The report with the layers of each artifact that disagrees, where its format has `intermediates`."""
    wanted = {outcome.format for outcome in report.outcomes if outcome.state == "mismatch" and not outcome.layers}
    for each in runnables(report, formats) if wanted else ():
        if each.name in wanted and each.format.intermediates is not None:
            watch(each.name, "comparing its layers")
            outcomes = tuple(_with_layers(o, report, each, dispatcher) for o in report.outcomes)
            report = replace(report, outcomes=outcomes)
            watch(each.name, None)
    return report


def _with_layers(outcome: Outcome, report: Report, each: Runnable, dispatcher: Dispatcher) -> Outcome:
    if outcome.format != each.name:
        return outcome
    try:
        found = layers(report, each, dispatcher)
    except (CannotRun, OSError):  # the log has it
        return outcome
    reason = "; ".join(filter(None, [outcome.reason, divergence(found)]))
    return replace(outcome, layers=found, reason=reason)
