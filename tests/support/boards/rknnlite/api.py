"""A stand-in for Rockchip's runtime on boards, whose wheels are for arm64 alone: its interface over the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polyexport.formats.rknn import simulator


class RKNNLite:
    def load_rknn(self, path: str) -> int:
        self._path = Path(path)
        return 0

    def init_runtime(self) -> int:
        self._toolkit = simulator(self._path.resolve())
        return 0

    def inference(self, inputs: list[Any], data_format: list[str]) -> list[Any]:
        return self._toolkit.inference(inputs=inputs, data_format=data_format)
