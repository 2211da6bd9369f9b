"""TensorRT as far as a kit uses it. It has no kernels: an engine replays the golden outputs of its component when it is given their inputs,
off by as much as the simulated device says, and gives zeros for any other inputs.

What the builder was told is added to the device's log, a line of JSON for each engine.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import runtime

with open(os.environ["SIMULATED_DEVICE"], encoding="utf-8") as stream:
    device = json.load(stream)
if not device["tensorrt"]:
    raise ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt")
__version__ = device["tensorrt"]


class ILogger:
    class Severity:
        ERROR = 1


class IProgressMonitor:
    pass


class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 3


class MemoryPoolType:
    WORKSPACE = "workspace"


class Network:
    num_layers = 5
    component = ""


class Config:
    def __init__(self) -> None:
        self.told: dict[str, Any] = {}
        self.progress_monitor: Any = None
        self.cache = b""

    def set_memory_pool_limit(self, pool: str, limit: int) -> None:
        self.told[pool] = limit

    def add_optimization_profile(self, profile: Profile) -> None:
        self.told["shapes"] = profile.shapes

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> None:
        self.cache = cache

    def get_timing_cache(self) -> Any:
        return self

    def serialize(self) -> bytes:
        return self.cache + b"one more kernel, "


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: Any) -> None:
        self.shapes[name] = shapes


class Builder:
    def __init__(self, log: Any):
        self.log = log

    def create_network(self, flags: int) -> Network:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        with open(device["log"], "a", encoding="utf-8") as log:
            log.write(json.dumps({"component": network.component, **config.told}) + "\n")
        if network.component == device.get("killed"):
            os.kill(os.getpid(), 9)
        if network.component == device.get("refused"):
            self.log.log(1, "Could not find any implementation for node Conv_7.")
            return None
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 20)
        for step in range(20):
            time.sleep(device.get("seconds", 0.0) / 20)
            if not monitor.step_complete("Building engine", step):
                return None
        monitor.phase_finish("Building engine")
        return b"engine " + network.component.encode()


class OnnxParser:
    def __init__(self, network: Network, log: Any):
        self.network = network

    def parse_from_file(self, file: str) -> bool:
        self.network.component = Path(file).parent.name
        return True


class Runtime:
    def __init__(self, log: Any):
        self.log = log

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        if not data.startswith(b"engine "):
            self.log.log(1, "Serialization assertion failed.")
            return None
        return Engine(data.split()[1].decode())


class Engine:
    def __init__(self, component: str):
        with np.load(Path(device["golden"]) / f"{component}.npz") as arrays:
            known = {name: arrays[name] for name in arrays.files}
        self.inputs = {name[3:]: array for name, array in known.items() if name.startswith("in.")}
        self.outputs = {name[4:]: array for name, array in known.items() if name.startswith("out.")}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)
        self.off_by = device.get("off_by", {}).get(component, 0.0)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine):
        self.engine = engine
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: Any) -> bool:
        return tuple(shape) == self.engine.inputs[name].shape

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.engine.outputs[name].shape)

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        runtime.do(self.work)
        return True

    def work(self) -> None:
        known = all((self.array(name, like) == like).all() for name, like in self.engine.inputs.items())
        for name, golden in self.engine.outputs.items():
            self.array(name, golden)[...] = golden * (1 + self.engine.off_by) if known else 0

    def array(self, name: str, like: np.ndarray) -> np.ndarray:
        block = (ctypes.c_byte * like.nbytes).from_address(self.addresses[name])
        return np.frombuffer(memoryview(block), like.dtype).reshape(like.shape)
