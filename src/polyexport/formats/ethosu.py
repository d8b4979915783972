"""Ethos-U: an int8 TensorFlow Lite model, compiled for Arm's accelerators for microcontrollers.

https://developer.arm.com/documentation/109267/latest/Tool-support-for-the-Arm-Ethos-U-NPU/Ethos-U-Vela-compiler

Requirements:
* It is compiled from `tflite-int8-nhwc`, as for the Edge TPU: all in int8, channels last, one row per call.
* Vela, Arm's compiler, is a wheel. It estimates memory and time by a model of the chip, and the report repeats that.
* Nothing here runs a compiled model, so what is verified is the int8 model before compilation, on the CPU.
* What the accelerator does not support runs on the microcontroller by TensorFlow Lite Micro; with more than a tenth of
  the operations there, the outcome is `degraded`. Vela itself refuses some models.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyexport.format import Convert, Format, Loaded, Route, Snippet
from polyexport.formats.edgetpu import Placement, before_compilation
from polyexport.spec import ExportSpec
from polyexport.workers import programs

URL = "https://pypi.org/project/ethos-u-vela/"

_MODEL = "model.tflite"
_ARTIFACT = "model_vela.tflite"
_SUMMARY = "vela.json"


@dataclass(frozen=True, slots=True)
class Chip:
    """A target of Vela: the accelerator, and the system around it by the sections of Vela's `Arm/vela.ini`."""

    title: str
    accelerator: str
    system: str
    memory: str

    def words(self) -> list[str]:
        """The arguments of `vela`."""
        system = ("--config", "Arm/vela.ini", "--system-config", self.system, "--memory-mode", self.memory)
        return ["--accelerator-config", self.accelerator, *system]


CHIPS = {
    "ethosu": Chip("Ethos-U55", "ethos-u55-128", "Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethosu-u65": Chip("Ethos-U65", "ethos-u65-256", "Ethos_U65_High_End", "Dedicated_Sram"),
    "ethosu-u85": Chip("Ethos-U85", "ethos-u85-256", "Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB"),
}
"""The first systems in Vela's documentation."""


def compile_for(chip: Chip) -> Convert:
    """A conversion of the int8 model for one chip."""

    def convert(source: Path, target: Path, spec: ExportSpec) -> None:
        """Run Vela, and write its model next to a copy of the int8 one, with its estimates in `vela.json`.

        Raises:
            RuntimeError: Vela refuses the model; the message says what Vela does.
        """
        shutil.copyfile(source, target.with_name(_MODEL))
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-P", "-m", "ethosu.vela", *chip.words(), "--output-dir", folder, str(source)]
            done = _run(words)
            ignored = _PAD if done.returncode and _UNFIT.search(done.stderr) else ""
            if ignored:
                again = _run([*words, "--ignore-ops", ignored])
                done, ignored = (done, "") if again.returncode else (again, ignored)
            if done.returncode:
                bools = [each.name for each in spec.inputs if each.dtype == "bool"]
                raise RuntimeError(f"Vela refuses it: {_why(done.stderr or done.stdout, chip, bools)}")
            shutil.copyfile(Path(folder, f"{source.stem}_vela.tflite"), target)
            (summary,) = Path(folder).glob("*_summary_*.csv")
            placed = placement(done.stdout, _kinds(source), ignored)
            found = {**placed, **estimates(summary.read_text(encoding="utf-8"))}
        target.with_name(_SUMMARY).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    return convert


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Vela, with a list of the operations on the CPU if it can make one."""
    done = programs.run([*words, "--show-cpu-operations"])
    return programs.run(words) if done.returncode and _LISTING in done.stderr else done


_LISTING = "in regor_operations_from_database"
"""In the traceback if Vela fails after compiling, as it lists an operation that it made itself."""

_UNFIT = re.compile(r"Non-passthrough operation \((\w+)\) could not run on NPU")
"""What Vela raises where it has planned an operation for the accelerator, which does not have it like that.

One cause is a padding that it makes part of the convolution behind it. Strides over 3, which it rewrites for lack of
them, it rewrites of convolutions without padding only. With the padding on the CPU they remain on the accelerator.
"""

_PAD = "PAD"


def _why(said: str, chip: Chip, bools: Sequence[str] = ()) -> str:
    """Why Vela ends without a model, from the end of its output."""
    if unfit := _UNFIT.search(said):
        if bools and unfit[1] == "NotEqual":
            return (
                f"it compares inputs of bool with zero, which the {chip.title} cannot; give {', '.join(bools)} as "
                "another type, such as float32"
            )
        return (
            f"it plans an operation {unfit[1]} for the {chip.title} that this does not have like that, and ends there, "
            "which is a fault of Vela's"
        )
    before, _, error = said.rpartition("Error: ")
    kind, words = re.split(r"\W", before)[-1], " ".join(error.split())
    return f"it fails by itself, with {kind}Error: {words}" if kind else words


def _kinds(source: Path) -> dict[str, str]:
    """The kind of each operation of a TensorFlow Lite model by the name of its output."""
    from ethosu.vela.tflite.BuiltinOperator import BuiltinOperator
    from ethosu.vela.tflite.Model import Model

    names = {value: name for name, value in vars(BuiltinOperator).items()}
    model = Model.GetRootAs(source.read_bytes())
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    kinds = [names[max(each.BuiltinCode(), each.DeprecatedBuiltinCode())] for each in codes]
    graph = model.Subgraphs(0)
    operations = [graph.Operators(i) for i in range(graph.OperatorsLength())]
    return {graph.Tensors(each.Outputs(0)).Name().decode(): kinds[each.OpcodeIndex()] for each in operations}


_REASONS = {
    r"Unsupported opType": "not supported",
    r"Operation has tensor with unsupported DataType Float32.*": "in float32",
    r"Unsupported depth-reduction.*": "over channels, with none of height, width and channels 1",
}
"""Vela's reasons, as far as they hold for several operations, and how they are told."""


def placement(said: str, kinds: Mapping[str, str], ignored: str = "") -> dict[str, object]:
    """How many operations Vela left on the CPU, by TensorFlow Lite's names with the reason, and how many there are.

    Args:
        said: Vela's output. By its end it has rewritten the operations, and calls most of those `Passthrough`.
        kinds: The kind of each operation by the name of its output.
        ignored: The kind that it was told to leave there.

    Raises:
        ValueError: the output has no such numbers.
    """
    counts = dict(re.findall(r"^(CPU|NPU) operators = (\d+)", said, re.MULTILINE))
    if counts.keys() != {"CPU", "NPU"}:
        raise ValueError("Vela's output does not say how many operations are on the accelerator")
    refused = dict(re.findall(r"^Warning .* operator: \w+, ofm: '(.*)'\nReason: (.*)$", said, re.MULTILINE))
    listed = re.findall(r"^\s+CPU: \w+ = (.*) \(outputs ", said, re.MULTILINE) or list(refused)
    on_cpu = Counter(_described(kinds[name], refused.get(name, ""), ignored) for name in listed if name in kinds)
    if (unnamed := int(counts["CPU"]) - on_cpu.total()) > 0:
        on_cpu["operations without a name"] += unnamed
    return {"operations": sum(map(int, counts.values())), "on_cpu": on_cpu}


def _described(kind: str, reason: str, ignored: str) -> str:
    """An operation on the CPU, with the reason if it is known."""
    if kind == ignored:
        return f"{kind} (before a convolution, which Vela fails on)"
    told = next((re.sub(known, words, reason) for known, words in _REASONS.items() if re.match(known, reason)), reason)
    return f"{kind} ({told})" if told else kind


def estimates(text: str) -> dict[str, float | str]:
    """The estimates in Vela's CSV summary: memory in KiB, time in milliseconds at a clock in MHz."""
    (row,) = csv.DictReader(text.splitlines())
    kept = {name: float(row[f"{name}_memory_used"]) for name in ("sram", "dram", "on_chip_flash", "off_chip_flash")}
    return {
        "accelerator": row["accelerator_configuration"].replace("_", "-"),
        "clock_mhz": float(row["core_clock"]) / 1e6,
        "milliseconds": float(row["inference_time"]) * 1e3,
        **{f"{name}_kib": kib for name, kib in kept.items()},
    }


def described(found: Mapping[str, Any]) -> str:
    """The estimates in a line."""
    kinds = {"sram": "SRAM", "dram": "DRAM", "on_chip_flash": "flash on the chip", "off_chip_flash": "flash"}
    memory = [f"{found[f'{kind}_kib']:,.1f} KiB of {name}" for kind, name in kinds.items() if found[f"{kind}_kib"]]
    time = f"{found['milliseconds']:.3g} ms at {found['clock_mhz']:.0f} MHz"
    return f"Vela's estimate for {found['accelerator']}: {', '.join([time, *memory])}"


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run the int8 model before compilation on the CPU, since there is no accelerator here."""
    found = json.loads(path.with_name(_SUMMARY).read_text(encoding="utf-8"))
    placed = Placement(found["operations"], Counter(found["on_cpu"]), "the Ethos-U")
    model = path.with_name(_MODEL)
    return before_compilation(model, spec, threads=threads, compiler="Vela", placed=placed, remark=described(found))


_CODE = """\
#include <cstring>

#include "tensorflow/lite/micro/micro_interpreter.h"
#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"
#include "tensorflow/lite/schema/schema_generated.h"

// model_vela: the bytes of {{ path }}, as `xxd -i` writes them
extern const unsigned char model_vela[];
alignas(16) static uint8_t arena[ARENA_BYTES];  // the report says how much SRAM Vela estimates

TfLiteStatus run(const int8_t* input, int8_t* output) {
    tflite::MicroMutableOpResolver<1> operations;  // and those that stay on the CPU
    operations.AddEthosU();
    tflite::MicroInterpreter interpreter(tflite::GetModel(model_vela), operations, arena, sizeof(arena));
    if (interpreter.AllocateTensors() != kTfLiteOk) return kTfLiteError;
    memcpy(interpreter.input(0)->data.int8, input, interpreter.input(0)->bytes);
    if (interpreter.Invoke() != kTfLiteOk) return kTfLiteError;
    memcpy(output, interpreter.output(0)->data.int8, interpreter.output(0)->bytes);
    return kTfLiteOk;
}
"""

FORMATS = tuple(
    Format(
        name=name,
        description=f"TensorFlow Lite model compiled for Arm's {chip.title} accelerator ({chip.accelerator})",
        url=URL,
        artifact=_ARTIFACT,
        graph=_ARTIFACT,
        precision="int8",
        routes=(Route("vela", "tflite-int8-nhwc", "vela", compile_for(chip)),),
        load=load,
        runtime="tflite",
        aliases=("ethos-u", "vela") if name == "ethosu" else (),
        calibrated=True,
        targets=("microcontroller",),
        snippets=(Snippet("C++", _CODE),),
    )
    for name, chip in CHIPS.items()
)
