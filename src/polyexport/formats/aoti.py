"""AOTInductor: PyTorch compiled ahead of time, for CPUs and for NVIDIA GPUs; a package that C++ loads without Python.

https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html

Requirements:
* It is compiled by this machine's C++ compiler, for its operating system and its version of PyTorch. On x86 it runs on
  any CPU with AVX2 if this one has that, not only on CPUs like this one.
* The number of threads is decided where it runs, not where it was compiled.
* For a GPU it is compiled on one of that compute capability, by Triton and CUDA's toolkit; TF32 is off where we run it,
  and is the application's choice elsewhere.
* Intermediate files are in the worker's temporary folder, and none are kept.
"""

from __future__ import annotations

import inspect
import os
import platform
import shlex
import tempfile
from pathlib import Path
from typing import Any

from polyexport.errors import CannotRun, ToolMissing
from polyexport.format import Format, Loaded, Observed, Route, Snippet
from polyexport.formats.torchscript import CPP_INPUTS
from polyexport.spec import ExportSpec, example
from polyexport.workers import compiler, gpu
from polyexport.workers.gpu import device

_X86 = ("x86_64", "AMD64")
_COMPILED_FOR = "compiled_for"
"""The metadata entry with the machines that the package runs on."""
_CAPABILITY = "compute_capability"
"""The metadata entry with the GPUs that the package runs on, such as 9.0."""


def lacks() -> str:
    """What is missing if there is no C++ compiler, in a line."""
    return compiler.missing("C++")


def lacks_for_gpu() -> str:
    """What is missing if there is no GPU or no C++ compiler, in a line."""
    return gpu.missing() or lacks()


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Compile the program of `torch.export`, and package the library with its C++ source emptied.

    Raises:
        ToolMissing: there is no C++ compiler.
    """
    if why := lacks():
        raise ToolMissing(why)
    from polyexport.tracing.exported_program import load_program

    settings, runs_on = _settings()
    _compile(load_program(source), "cpu", target, settings, {**spec.embedded, _COMPILED_FOR: runs_on}, spec)


def convert_for_gpu(source: Path, target: Path, spec: ExportSpec) -> None:
    """Compile it for the first GPU.

    Raises:
        ToolMissing: there is no C++ compiler, or no GPU that PyTorch can use.
    """
    if why := lacks_for_gpu():
        raise ToolMissing(why)
    here = device()
    from torch.export.passes import move_to_device_pass

    from polyexport.tracing.exported_program import load_program

    settings, host = _settings()
    about = {_COMPILED_FOR: f"NVIDIA GPUs of compute capability {here.capability}; {host}"}
    metadata = {**spec.embedded, **about, _CAPABILITY: here.capability}
    on = "cuda:0"  # with its index: checks in the program compare devices, and tensors have one
    _compile(move_to_device_pass(load_program(source), on), on, target, settings, metadata, spec)


def _compile(
    program: Any, on: str, target: Path, settings: dict[str, Any], metadata: dict[str, str], spec: ExportSpec
) -> None:
    """Compile a program whose tensors are on the device `on`."""
    import torch
    from torch import _inductor as inductor
    from torch._inductor.package.package import package_aoti

    by = f", by {compiler.version('C++')} and PyTorch {torch.__version__}"
    module, inputs = _unguarded(program), tuple(torch.from_numpy(each).to(on) for each in example(spec).values())
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # compiled again each time: the cache may be another user's
        settings |= {
            "aot_inductor.metadata": metadata | {_COMPILED_FOR: metadata[_COMPILED_FOR] + by},
            "cpp.cxx": _without_paths(Path(cache)),
        }
        files: Any = inductor.aot_compile(module, inputs, options=settings)
        for file in files:
            if str(file).endswith(".cpp"):  # PyTorch up to 2.11 looks for the metadata next to a file of this name
                Path(file).write_text("", encoding="utf-8")
        package_aoti(str(target), files)


def _unguarded(program: Any) -> Any:
    """The program as a module that does not check the sizes of its inputs, as Inductor's own function makes it.

    The package checks its inputs itself, and not every check can be compiled for a GPU.
    """
    if "check_guards" in inspect.signature(program.module).parameters:
        return program.module(check_guards=False)
    return program.module()  # PyTorch before it had such checks


def _without_paths(folder: Path) -> tuple[str]:
    """A compiler command for Inductor that writes no path of this machine into what it compiles in `folder`."""
    import torch

    program = compiler.program("C++")
    script = folder / Path(program).name
    maps = [
        f"-ffile-prefix-map={path}={name}" for path, name in ((folder, "."), (Path(torch.__file__).parent, "torch"))
    ]
    script.write_text(
        f'#!/bin/sh\nexec {shlex.join([program, *maps])} "$@"\n', encoding="utf-8", errors="surrogateescape"
    )
    script.chmod(0o700)
    return (str(script),)


def _settings() -> tuple[dict[str, Any], str]:
    """Inductor's settings, as far as this release of PyTorch has them, and what the package will run on.

    On x86 they limit it to instructions that many CPUs have; elsewhere it uses all that this one has.
    """
    import torch
    from torch import _inductor as inductor

    can, runs_on = inductor.list_options(), f"{platform.system()} on {platform.machine()}"
    settings, like_this = dict(_SETTINGS), "CPUs like this one"
    if platform.machine() in _X86:
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            settings |= {"cpp.march": "x86-64-v3", **_AVX2}
            portable = "any CPU with AVX2"
        else:
            settings["cpp.march"] = "x86-64"
            portable = "any CPU"
        like_this = portable if "cpp.march" in can else like_this
    return {name: value for name, value in settings.items() if name in can}, f"{runs_on}, {like_this}"


_AVX2 = {"cpp.simdlen": 256, "cpp.vec_isa_ok": True}
"""Inductor's settings for a CPU with AVX2; without them it compiles and runs a program for each kind of vectors."""

_SETTINGS = {
    "aot_inductor.package": True,
    "aot_inductor.model_name_for_generated_files": "model",  # else a hash of text with temporary paths
    "aot_inductor.precompile_headers": False,  # they take minutes, and are used only twice
    "aot_inductor.enable_line_tables": False,  # for debuggers
    "cpp.dynamic_threads": True,
    "compile_threads": 1,  # more would be processes that each import PyTorch
}


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run the package with PyTorch's own loader, which is C++."""
    import torch

    from polyexport.capture.flatten import as_runner

    torch.set_num_threads(threads)
    package = _opened(path)
    return Loaded(
        as_runner(package, spec),
        remark=f"compiled for {package.get_metadata()[_COMPILED_FOR]}",
    )


def load_on_gpu(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run the package on the first GPU; a call returns when the outputs are in host memory.

    Raises:
        CannotRun: there is no GPU, or the package was compiled for others.
    """
    if why := gpu.missing():
        raise CannotRun(f"cannot be run here: {why}")
    here = device()
    import torch

    from polyexport.capture.flatten import as_runner

    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # by default it is on for convolutions: ten bits of mantissa
    package = _opened(path)
    metadata = package.get_metadata()
    if here.capability != metadata[_CAPABILITY]:
        found = f"{here.name} has compute capability {here.capability}"
        raise CannotRun(f"{found}, and the package is for {metadata[_CAPABILITY]}")

    def on_gpu(*inputs: torch.Tensor) -> Any:
        return package(*(each.cuda() for each in inputs))

    return Loaded(
        as_runner(on_gpu, spec),
        remark=f"compiled for {metadata[_COMPILED_FOR]}",
        observed=lambda: Observed(device=here.name),
    )


def _opened(path: Path) -> Any:
    """A package, without what PyTorch compiles at each load to see which vector instructions this x86 CPU has."""
    from torch import _inductor as inductor

    known = _AVX2 if platform.machine() in _X86 else {}
    with inductor.config.patch({name: value for name, value in known.items() if name in inductor.list_options()}):
        return inductor.aoti_load_package(str(path))


def _snippets(moved: str) -> tuple[Snippet, ...]:
    """Code that runs the package; `moved` is the method that moves a tensor to its device, if that is not the CPU."""
    cpp = f"  for (auto& input : inputs) input = input{moved};\n" if moved else ""
    return (
        Snippet(
            "C++",
            f"""\
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main() {{
  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model("{{{{ path }}}}");
  std::vector<at::Tensor> inputs{{
{CPP_INPUTS}
  }};
{cpp}  std::vector<at::Tensor> outputs = model.run(inputs);
}}
""",
        ),
        Snippet(
            "Python",
            f"""\
import numpy as np
import torch

model = torch._inductor.aoti_load_package("{{{{ path }}}}")
batch = np.load("{{{{ batch }}}}")
with torch.inference_mode():
    outputs = model(*(torch.from_numpy(batch[name]){moved} for name in {{{{ names | tojson }}}}))
""",
        ),
    )


FORMATS = (
    Format(
        name="aoti",
        aliases=("aotinductor",),
        description="AOTInductor package: PyTorch compiled to native code, for C++ without Python",
        url="https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html",
        artifact="model.pt2",
        routes=(Route("pt2", upstream="pt2", toolchain="torch", convert=convert),),
        load=load,
        lacks=lacks,
        targets=("server CPU",),
        snippets=_snippets(""),
    ),
    Format(
        name="aoti-cuda",
        description="AOTInductor package for NVIDIA GPUs like the one it was compiled on",
        url="https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html",
        artifact="model.pt2",
        routes=(Route("pt2", upstream="pt2", toolchain="torch", convert=convert_for_gpu),),
        load=load_on_gpu,
        uses_gpu=True,
        lacks=lacks_for_gpu,
        targets=("GPU",),
        snippets=_snippets(".cuda()"),
    ),
)
