"""Ethos-U: an int8 TensorFlow Lite model, compiled for Arm's accelerators for microcontrollers.

https://developer.arm.com/documentation/109267/latest/Tool-support-for-the-Arm-Ethos-U-NPU/Ethos-U-Vela-compiler

Requirements:
* It is compiled from `tflite-int8-nhwc`, as for the Edge TPU: all in int8, channels last, one row per call.
* Vela, Arm's compiler, is a wheel. It estimates memory and time by a model of the chip, and the report repeats that.
* Nothing here runs a compiled model, so what is verified is the int8 model before compilation, on the CPU.
* What the accelerator does not support runs on the microcontroller by TensorFlow Lite Micro; with more than a tenth of
  the operations there, the outcome is `degraded`. Vela itself refuses some models, with its words as the reason.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
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
            RuntimeError: Vela refuses the model; the message is Vela's.
        """
        shutil.copyfile(source, target.with_name(_MODEL))
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-P", "-m", "ethosu.vela", *chip.words(), "--output-dir", folder, str(source)]
            done = programs.run([*words, "--show-cpu-operations"])
            if done.returncode and _LISTING in done.stderr:
                done = programs.run(words)
            if done.returncode:
                raise RuntimeError(f"Vela refuses it: {_why(done.stderr or done.stdout)}")
            shutil.copyfile(Path(folder, f"{source.stem}_vela.tflite"), target)
            (summary,) = Path(folder).glob("*_summary_*.csv")
            found = {**placement(done.stdout), **estimates(summary.read_text(encoding="utf-8"))}
        target.with_name(_SUMMARY).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    return convert


_LISTING = "in regor_operations_from_database"
"""In the traceback if Vela fails after compiling, as it lists an operation that it made itself."""


def _why(said: str) -> str:
    """Vela's own error, or the exception that it did not expect, from the end of its output."""
    before, _, error = said.rpartition("Error: ")
    kind, words = re.split(r"\W", before)[-1], " ".join(error.split())
    return f"it fails by itself, with {kind}Error: {words}" if kind else words


def placement(said: str) -> dict[str, object]:
    """How many operations Vela left on the CPU, by TensorFlow Lite's names, and how many there are.

    Raises:
        ValueError: the output has no such numbers.
    """
    counts = dict(re.findall(r"^(CPU|NPU) operators = (\d+)", said, re.MULTILINE))
    if counts.keys() != {"CPU", "NPU"}:
        raise ValueError("Vela's output does not say how many operations are on the accelerator")
    refused = dict.fromkeys(
        re.findall(r"^Warning \(supported operators\) operator: (\w+), ofm: '(.*)'$", said, re.MULTILINE)
    )
    on_cpu = Counter(name for name, _ in refused)
    if on_cpu.total() != int(counts["CPU"]):  # Vela has rewritten them by then, and calls most `Passthrough`
        on_cpu = Counter(re.findall(r"^\s+CPU: (\w+) = ", said, re.MULTILINE))
    if (unnamed := int(counts["CPU"]) - on_cpu.total()) > 0:
        on_cpu["operations without a name"] += unnamed
    return {"operations": sum(map(int, counts.values())), "on_cpu": on_cpu}


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
