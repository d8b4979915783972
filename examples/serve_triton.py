"""Serve the ONNX models of a Triton model repository by Triton's protocol, without Triton.

pip install fastapi uvicorn onnxruntime
python examples/hand_over.py
MODELS=runs/hand_over/models uvicorn --app-dir examples serve_triton:app

It answers `GET /v2/models/digits_onnx` and `POST /v2/models/digits_onnx/infer` as in the Open Inference Protocol
(KServe's v2), in JSON; with the parameter `classification` it returns labels instead of numbers, as Triton does.
"""

import functools
import os
from pathlib import Path
from typing import Annotated, Any

import fastapi
import numpy as np
import onnxruntime
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel

MODELS = Path(os.environ.get("MODELS", "models"))
NAMES = {"uint8": "UINT8", "int32": "INT32", "int64": "INT64", "float": "FP32", "float16": "FP16", "bool": "BOOL"}
DTYPES = {"FP32": "float32", "FP16": "float16"} | {name: name.lower() for name in ("UINT8", "INT32", "INT64", "BOOL")}
app = FastAPI()


async def sent(request: fastapi.Request) -> bytes:
    """The body with any content type, since Triton's client sends none."""
    return await request.body()


class Input(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


class Output(BaseModel):
    name: str
    parameters: dict[str, Any] = {}


class Request(BaseModel):
    id: str = ""
    inputs: list[Input]
    outputs: list[Output] = []


@functools.cache
def opened(name: str) -> tuple[onnxruntime.InferenceSession, list[str], int]:
    """A session with the newest version of a model, its labels, and the version's number."""
    folder = MODELS / Path(name).name
    versions = [int(path.name) for path in folder.glob("*") if (path / "model.onnx").is_file()]
    if not versions:
        raise HTTPException(404, f"no ONNX model {name!r} in {MODELS}")
    labels = folder / "labels.txt"
    session = onnxruntime.InferenceSession(folder / str(max(versions)) / "model.onnx")
    return session, labels.read_text("utf-8").splitlines() if labels.exists() else [], max(versions)


@app.get("/v2/health/ready")
def ready() -> dict[str, bool]:
    return {"ready": True}


@app.get("/v2/models/{name}")
def about(name: str) -> dict[str, Any]:
    session, _, version = opened(name)
    inputs, outputs = (list(map(described, side)) for side in (session.get_inputs(), session.get_outputs()))
    versions = [str(version)]
    return {"name": name, "versions": versions, "platform": "onnxruntime_onnx", "inputs": inputs, "outputs": outputs}


def described(tensor: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else -1 for size in tensor.shape]
    return {"name": tensor.name, "datatype": NAMES[tensor.type.removeprefix("tensor(")[:-1]], "shape": shape}


@app.exception_handler(HTTPException)
def refused(_: Any, error: HTTPException) -> JSONResponse:
    return JSONResponse({"error": error.detail}, error.status_code)


@app.post("/v2/models/{name}/infer")
def infer(name: str, body: Annotated[bytes, Depends(sent)]) -> dict[str, Any]:
    session, labels, version = opened(name)
    try:
        request = Request.model_validate_json(body)
        wanted = request.outputs or [Output(name=each.name) for each in session.get_outputs()]
        given = {each.name: np.array(each.data, DTYPES[each.datatype]).reshape(each.shape) for each in request.inputs}
        arrays = session.run([each.name for each in wanted], given)
    except Exception as error:  # such as a name, a shape or a type that the model does not have
        raise HTTPException(400, f"{type(error).__name__}: {error}") from error
    outputs = [answered(*pair, labels) for pair in zip(wanted, arrays, strict=True)]
    return {"id": request.id, "model_name": name, "model_version": str(version), "outputs": outputs}


def answered(output: Output, array: np.ndarray, labels: list[str]) -> dict[str, Any]:
    """An output in the protocol's form; with `classification`, the best as `probability:index:label`."""
    if count := output.parameters.get("classification"):
        best = [f"{row[i]:f}:{i}:{labels[i]}" for row in array for i in row.argsort()[::-1][:count]]
        return {"name": output.name, "datatype": "BYTES", "shape": [len(array), count], "data": best}
    datatype = next(name for name, dtype in DTYPES.items() if dtype == array.dtype.name)
    return {"name": output.name, "datatype": datatype, "shape": array.shape, "data": array.ravel().tolist()}
