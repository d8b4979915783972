"""A model repository of NVIDIA's Triton Inference Server: a versioned folder for each artifact, and its configuration.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from polyexport.errors import BadRequest
from polyexport.format import Triton
from polyexport.formats import known
from polyexport.report.folders import DESCRIPTION
from polyexport.report.outcome import Outcome
from polyexport.report.report import Report
from polyexport.serialization import write_text
from polyexport.spec import LABELS, TensorSpec

_TYPES = {"bool": "BOOL", "bfloat16": "BF16"} | {
    f"{kind}{bits}": f"{short}{bits}"
    for kind, short, sizes in (
        ("float", "FP", (16, 32, 64)),
        ("int", "INT", (8, 16, 32, 64)),
        ("uint", "UINT", (8, 16, 32, 64)),
    )
    for bits in sizes
}


class TritonRepository:
    """A sink into a model repository: each artifact that agrees with PyTorch is the next version of a model.

    Not a dataclass, since Hydra takes those for a part of the configuration.

    Args:
        folder: The model repository.
        name: The models are named `<name>_<format>`.
        max_batch_size: The largest batch that Triton may make of requests, if the batch axis is dynamic.
    """

    def __init__(self, folder: str | Path, *, name: str = "model", max_batch_size: int = 64) -> None:
        self.folder = folder
        self.name = name
        self.max_batch_size = max_batch_size

    def __call__(self, report: Report) -> None:
        """Publish the artifacts of a report.

        Raises:
            BadRequest: none of them agrees with PyTorch and can be served by Triton.
        """
        served = [(outcome, triton) for outcome in report.publishable if (triton := _served(outcome)) is not None]
        if not served:
            having = ", ".join(each.name for each in known().values() if each.triton)
            raise BadRequest(f"no artifact that agrees with PyTorch can be served by Triton; it serves {having}")
        for outcome, triton in served:
            self._publish(report, outcome, triton)

    def _publish(self, report: Report, outcome: Outcome, triton: Triton) -> None:
        """Add a version; it appears at once, and Triton takes the newest."""
        assert outcome.artifact is not None, "an outcome that agrees has an artifact"
        model = Path(self.folder) / f"{self.name}_{outcome.format}"
        model.mkdir(parents=True, exist_ok=True)
        artifact = report.folder / outcome.artifact.path
        number = max((int(each.name) for each in model.iterdir() if each.name.isdecimal()), default=0) + 1
        unfinished = model / f".{number}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        if artifact.is_dir():
            shutil.copytree(artifact, unfinished / triton.file)
        else:
            for file in artifact.parent.iterdir():  # weights may be in files of their own
                if file.name not in (DESCRIPTION, LABELS):
                    shutil.copyfile(file, unfinished / (triton.file if file == artifact else file.name))
        if (artifact.parent / LABELS).exists():
            shutil.copyfile(artifact.parent / LABELS, model / LABELS)
        labels = report.model.labels if report.model else ()
        write_text(model / "config.pbtxt", config(model.name, outcome, triton, self.max_batch_size, len(labels)))
        unfinished.rename(model / str(number))


def _served(outcome: Outcome) -> Triton | None:
    each = known().get(outcome.format)
    return each.triton if each else None


def config(name: str, outcome: Outcome, triton: Triton, max_batch_size: int, labels: int = 0) -> str:
    """`config.pbtxt` of an artifact, in protobuf's text form.

    Triton makes batches if the first axis of every input and output is the same dynamic one; it is then left out of
    the dimensions.
    """
    leading = {tensor.dynamic.get(0) for tensor in (*outcome.inputs, *outcome.outputs)}
    batched = len(leading) == 1 and None not in leading
    kind = "platform" if triton.is_platform else "backend"
    lines = [f"name: {_text(name)}", f"{kind}: {_text(triton.backend)}"]
    lines.append(f"max_batch_size: {max_batch_size if batched else 0}")
    for direction, tensors in (("input", outcome.inputs), ("output", outcome.outputs)):
        for index, tensor in enumerate(tensors):
            called = f"{tensor.name}__{index}" if triton.indexed else tensor.name
            lines += _tensor(direction, called, tensor, tensor.shape[1:] if batched else tensor.shape)
            if labels and direction == "output" and tensor.shape[-1:] == (labels,):
                lines.append(f"  label_filename: {_text(LABELS)}")
            lines.append("}")
    return "\n".join([*lines, ""])


def _tensor(direction: str, name: str, tensor: TensorSpec, shape: tuple[int | str, ...]) -> Iterator[str]:
    dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in shape)
    yield f"{direction} {{"
    yield f"  name: {_text(name)}"
    yield f"  data_type: TYPE_{_TYPES[tensor.dtype]}"
    yield f"  dims: [ {dims or 1} ]"
    if not shape:  # Triton has no scalars
        yield "  reshape { shape: [ ] }"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
