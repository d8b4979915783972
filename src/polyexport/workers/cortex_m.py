"""A Cortex-M4 in QEMU: compiles a function of C for it, runs it, and measures the memory that takes.

Requirements:
* It is a whole program without an operating system: flash has code and constants, RAM has the inputs and outputs too.
* Stack and heap are measured while it runs. Time is not: QEMU does not count the processor's cycles.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polyexport.errors import CannotRun

PROCESSOR = "Cortex-M4 in QEMU"

_COMPILER, _EMULATOR, _BOARD = "arm-none-eabi-gcc", "qemu-system-arm", "mps2-an386"

_STACK_BYTES = 2 * 2**20

_SECONDS = 60.0
"""How long it may run in QEMU."""

_HERE = Path(__file__).parent

_TARGET = ("-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16", "-mfp16-format=ieee")

_FLAGS = ("-std=gnu11", "-O2", "-w", "-ffunction-sections", "-fdata-sections", "-fstack-usage")

_LINKED = (
    "-nostartfiles",
    "--specs=nano.specs",
    "--specs=nosys.specs",
    "-Wl,--gc-sections",
    f"-Wl,--defsym=_stack_bytes={_STACK_BYTES}",
)

_FAULT, _NO_HEAP = 2, 3


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a program, in bytes; inputs and outputs are among the variables, the stack is what it used."""

    flash: int
    variables: int
    stack: int
    heap: int

    @property
    def ram(self) -> int:
        """All but flash."""
        return self.variables + self.stack + self.heap

    def __str__(self) -> str:
        """In words."""
        parts = {"stack": self.stack, "heap": self.heap, "inputs, outputs and other variables": self.variables}
        ram = ", ".join(f"{size:,} of {name}" for name, size in parts.items() if size)
        return f"{self.flash:,} bytes of flash and {self.ram:,} of RAM ({ram})"


def missing() -> str:
    """What is missing to run C on a Cortex-M here, and what to install, in a line; empty if nothing."""
    lacking = [name for name in (_COMPILER, _EMULATOR) if shutil.which(name) is None]
    if not lacking and not Path(_said(_COMPILER, "-print-file-name=nano.specs")).is_absolute():
        lacking = [f"newlib of {_COMPILER}"]
    if not lacking:
        return ""
    return (
        f"there is no {' and no '.join(lacking)} here "
        "(apt install gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm)"
    )


def tools() -> str:
    """The compiler and the emulator, with their versions."""
    emulator = re.search(r"version (\S+)", _said(_EMULATOR, "--version"))
    return f"{_COMPILER} {_said(_COMPILER, '-dumpfullversion')} and QEMU {emulator[1] if emulator else '?'}"


@dataclass(frozen=True, slots=True)
class Program:
    """A program for the board, in a folder: `call` runs its function once.

    Attributes:
        folder: Has `program.elf`, and what the last call read and wrote.
    """

    folder: Path

    def call(self, given: Sequence[np.ndarray], made: Sequence[np.ndarray]) -> Memory:
        """Run the function on the inputs, and write its outputs into `made`.

        Raises:
            CannotRun: its heap is too small, it takes too long in QEMU, or QEMU does not run it.
            RuntimeError: it ends with a fault.
        """
        (self.folder / "inputs.bin").write_bytes(b"".join(array.tobytes() for array in given))
        _emulate(self.folder)
        answer, start = (self.folder / "outputs.bin").read_bytes(), 0
        for array in made:
            array[...] = np.frombuffer(answer, array.dtype, array.size, start).reshape(array.shape)
            start += array.nbytes
        return Memory(*map(int, np.fromfile(self.folder / "memory.bin", "<u4")))


def compiled(source: Path, folder: Path, given: Sequence[int], made: Sequence[int]) -> Program:
    """Compile C whose function `model` takes pointers to its inputs and then to its outputs.

    Args:
        source: The C file.
        folder: Where the program is made, which runs there.
        given: The size of each input, in bytes.
        made: The size of each output, in bytes.

    Raises:
        CannotRun: flash, RAM or stack of the board are too small, or it does not compile, with the compiler's words.
    """
    (folder / "arrays.h").write_text(_arrays(given, made), encoding="utf-8")
    model, program = folder / "model.o", folder / "program.elf"
    _compile(*_FLAGS, "-c", str(source), "-o", str(model))
    frames = {
        name: int(size)
        for name, size in re.findall(r":(\w+)\t(\d+)", model.with_suffix(".su").read_text(encoding="utf-8"))
    }
    stack = frames.pop("model", 0) + max(frames.values(), default=0)
    if stack > _STACK_BYTES:
        raise CannotRun(f"it needs {stack:,} bytes of stack, and the program on QEMU's {_BOARD} has {_STACK_BYTES:,}")
    script = ("-T", str(_HERE / "cortex_m.ld"), "-I", str(folder))
    _compile(*_FLAGS, *_LINKED, *script, str(_HERE / "cortex_m.c"), str(model), "-o", str(program), "-lm")
    return Program(folder)


def _arrays(given: Sequence[int], made: Sequence[int]) -> str:
    """The part of the program that depends on the model's signature."""
    names = {f"given_{index}": size for index, size in enumerate(given)}
    answers = {f"made_{index}": size for index, size in enumerate(made)}
    arrays = ", ".join(f"{name}[{size}]" for name, size in (names | answers).items())
    listed = [", ".join(f"{{{name}, sizeof {name}}}" for name in each) for each in (names, answers)]
    return f"""\
extern void model();
static _Alignas(8) unsigned char {arrays};
static const struct array given[] = {{{listed[0]}}}, made[] = {{{listed[1]}}};
static void run(void) {{ model({", ".join([*names, *answers])}); }}
"""


def _compile(*words: str) -> None:
    done = subprocess.run(
        [_COMPILER, *_TARGET, *words], capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if overflow := re.findall(r"region `(\w+)' overflowed by (\d+) bytes", done.stderr):
        region, count = overflow[0]
        sizes = {"FLASH": "4 MiB of flash", "RAM": "16 MiB of RAM"}
        raise CannotRun(f"it needs {int(count):,} bytes more than the {sizes[region]} of QEMU's {_BOARD}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        why = next((each for each in lines if " error: " in each or "undefined reference" in each), lines[-1])
        raise CannotRun(f"{_COMPILER} fails: {why}")


def _emulate(folder: Path) -> None:
    quiet = ("-nographic", "-nodefaults", "-nic", "none", "-monitor", "none", "-serial", "none")
    machine = ("-machine", _BOARD, "-semihosting-config", "enable=on,target=native", "-kernel", "program.elf")
    try:
        done = subprocess.run(
            [_EMULATOR, *quiet, *machine],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise CannotRun(f"one row takes more than {_SECONDS:.0f} s in QEMU") from None
    if done.returncode == _NO_HEAP:
        raise CannotRun(f"its buffers need more heap than the 16 MiB of RAM of QEMU's {_BOARD} leave")
    if done.returncode == _FAULT or done.returncode < 0:
        raise RuntimeError("it ends with a fault")
    if done.returncode:
        raise CannotRun(f"{_EMULATOR} fails: {' '.join(done.stderr.split())}")


def _said(*words: str) -> str:
    return subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False).stdout.strip()
