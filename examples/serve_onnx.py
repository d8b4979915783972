"""An export's ONNX file as a web service: named arrays in, named arrays out, as JSON.

pip install fastapi uvicorn
python examples/detection.py
EXPORT=runs/detection/exports/best uvicorn --app-dir examples serve_onnx:app

http://127.0.0.1:8000/docs lists the inputs by name, and can send requests. Inputs that the model does not take are
answered with status 422 and the reason.
"""

import os
from pathlib import Path

import numpy as np
from fastapi import FastAPI, HTTPException
from pydantic import create_model

import polyexport

EXPORT = Path(os.environ.get("EXPORT", "exports/best"))
run = polyexport.load(EXPORT / "onnx")
dtypes = {tensor.name: tensor.dtype for tensor in polyexport.Report.load(EXPORT).model.inputs}
Inputs = create_model("Inputs", **dict.fromkeys(dtypes, list))
app = FastAPI()


@app.post("/")
def answer(inputs: Inputs) -> dict[str, list]:
    try:
        outputs = run({name: np.array(values, dtypes[name]) for name, values in inputs})
    except Exception as error:  # such as a ragged list, or a shape that the model does not take
        raise HTTPException(422, str(error)) from error
    return {name: array.tolist() for name, array in outputs.items()}
