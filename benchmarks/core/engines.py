"""The inference engines ONNX Runtime and OpenVINO as contenders on the CPU, each with the same layers as its graph.

Both are set up as a careful user would: the model built for the exact shape, weights as constants (which they pack when
they compile), one stream in latency mode, as many threads as torch has, input and output in the memory of our tensors
(no copies), the quickest call of their Python bindings. OpenVINO runs in NCHW and also in channels_last, by
transpositions that it folds into the layouts of its kernels; a bf16 graph is bf16 from input to output. ONNX's
convolutions are NCHW, and ONNX Runtime has no bfloat16 kernels on CPUs: in bfloat16 it is no peer.

With one thread neither engine starts any. With more, the workers of ONNX Runtime and of torch (libgomp) go on spinning
for milliseconds after a call, on the cores that the next contender needs. Spinning makes each contender by itself
faster, so it stays on (`session.intra_op.allow_spinning=0` would cost ONNX Runtime a wake-up in every layer), and
`bench.settle` waits between turns until it is over. OpenVINO's pinning is off: it would tie this thread, which also
runs the other contenders, to one core.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ENGINES = ("onnxruntime", "openvino")
NEEDED = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino",)}
HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}
# Nodes of OpenVINO's compiled graph that multiply: their precision is that of the arithmetic.
HEAVY_NODES = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Gemm", "RNNSeq", "LSTMSequence")
ONNX_OPSET, ONNX_IR = 17, 8


def missing(engine: str) -> str:
    """Why an engine cannot be a contender here; empty: it can."""
    absent = [name for name in NEEDED[engine] if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed (pip install '.[bench]')" if absent else ""


def unsupported(engine: str, dtype: torch.dtype) -> str:
    """Why an engine is no peer in a dtype; empty: it is one."""
    if engine == "onnxruntime" and dtype is not torch.float32:
        return f"ONNX Runtime has no {str(dtype).removeprefix('torch.')} kernels for CPUs: a peer in float32 only"
    return "" if dtype in HINTS else f"{engine} runs as a peer in float32 and bfloat16 only"


class OnnxRuntimeRun:
    """A session on one input; a call returns the output, the same tensor every time."""

    precision = "f32"
    kernels: tuple[str, ...] = ()

    def __init__(self, model: bytes | str, input: Tensor, threads: int) -> None:
        """`model` is an ONNX file or its content; `input` float32, NCHW or a matrix."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._input = input.contiguous()
        (output,) = self._session.get_outputs()
        self.output = torch.zeros(output.shape, dtype=torch.float32)
        self._binding = self._session.io_binding()
        for bind, end, tensor in (
            (self._binding.bind_input, self._session.get_inputs()[0], self._input),
            (self._binding.bind_output, output, self.output),
        ):
            bind(end.name, "cpu", 0, np.float32, list(tensor.shape), tensor.data_ptr())

    def __call__(self) -> Tensor:
        self._session.run_with_iobinding(self._binding)
        return self.output


def onnx_model(layers: Sequence[nn.Module], input: Tensor) -> bytes:
    """Convolutions and linear layers one after the other as an ONNX model for inputs of `input`'s shape."""
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes, constants, hidden = [], [], "input"
    shape = tuple(input.shape)
    for place, layer in enumerate(layers):
        parameters = {"weight": layer.weight, "bias": layer.bias}
        names = [f"{name}{place}" for name, value in parameters.items() if value is not None]
        given = [value for value in parameters.values() if isinstance(value, Tensor)]
        constants += [
            numpy_helper.from_array(value.detach().contiguous().numpy(), name)
            for name, value in zip(names, given, strict=True)
        ]
        output = "output" if place == len(layers) - 1 else f"hidden{place}"
        if isinstance(layer, nn.Conv2d):
            attributes: dict[str, Any] = {
                "kernel_shape": layer.kernel_size, "strides": layer.stride, "dilations": layer.dilation,
                "pads": _paddings(layer) * 2, "group": layer.groups,
            }  # fmt: skip
            nodes.append(helper.make_node("Conv", [hidden, *names], [output], **attributes))
        else:
            nodes.append(helper.make_node("Gemm", [hidden, *names], [output], transB=1))
        shape, hidden = _output_shape(layer, shape), output
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(sizes))
        for name, sizes in (("input", input.shape), ("output", shape))
    ]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)], ir_version=ONNX_IR)
    checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def _paddings(layer: nn.Conv2d) -> list[int]:
    assert not isinstance(layer.padding, str)
    return list(layer.padding)


def _output_shape(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    with torch.device("meta"):
        meta = torch.empty(shape)
    weights = {name: value.to(device="meta", dtype=torch.float32) for name, value in layer.named_parameters()}
    return tuple(torch.func.functional_call(layer, weights, (meta,)).shape)


def onnxruntime_layers(layers: Sequence[nn.Module], input: Tensor, threads: int) -> OnnxRuntimeRun:
    """The layers in ONNX Runtime."""
    return OnnxRuntimeRun(onnx_model(layers, input), input, threads)


class OpenVinoRun:
    """A compiled model on one input; a call returns the output, the same tensor every time."""

    def __init__(
        self,
        model: Any,
        input: Tensor,
        threads: int,
        dtype: torch.dtype,
        view: Callable[[Tensor], Tensor] | None = None,
        kept: Sequence[Any] = (),
    ) -> None:
        """`model` is an ov.Model, or the path or content of an ONNX file, whose input is `input`.

        `dtype` is the precision to infer in. `view` turns the model's output into the tensor that a call returns.
        `kept` holds the memory of the model's constants.
        """
        compiled = compile_openvino(model, threads, HINTS[dtype])
        self.precision, self.kernels = ran_as(compiled)
        self._kept = [input, *kept]
        shape = list(compiled.output(0).shape)
        kept_as = {"bf16": torch.bfloat16}.get(compiled.output(0).element_type.get_type_name(), torch.float32)
        output = torch.zeros(shape, dtype=kept_as)
        self.output = output if view is None else view(output)
        self._request = compiled.create_infer_request()
        self._request.set_input_tensor(shared(input, self._kept))
        self._request.set_output_tensor(shared(output, self._kept))

    def __call__(self) -> Tensor:
        # start_async and wait would save building a dictionary of outputs, but hand the call to another thread.
        self._request.infer(share_outputs=True)
        return self.output


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def compile_openvino(model: Any, threads: int, precision: str) -> Any:
    """Compiles an ov.Model, or the path or content of an ONNX file, for latency in a precision ("f32" or "bf16")."""
    options: Mapping[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,
    }
    return _core().compile_model(model, "CPU", options)


def ran_as(compiled: Any) -> tuple[str, tuple[str, ...]]:
    """The precision in which a compiled model really multiplies (several are joined by "+"), and its kernels' names.

    The precision that was set is only a hint: on a CPU without the instructions OpenVINO takes another one.
    """
    nodes = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        told = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        nodes.append((told.get("layerType", ""), told.get("runtimePrecision", ""), told.get("primitiveType", "")))
    # Two small matrix products become one generated kernel, a "Subgraph".
    heavy = [node for node in nodes if node[0] in HEAVY_NODES] or [node for node in nodes if node[0] == "Subgraph"]
    precisions = {precision.lower() for _, precision, _ in heavy}
    return "+".join(sorted(precisions)), tuple(sorted({kernel for _, _, kernel in heavy}))


def shared(tensor: Tensor, kept: list[Any]) -> Any:
    """An OpenVINO tensor in the memory of a contiguous torch tensor. `kept`, which holds it, must live as long."""
    import openvino

    if not tensor.is_contiguous():
        raise ValueError(f"shared: needs a contiguous tensor, got strides {tensor.stride()}")
    detached = tensor.detach()
    kept.append(detached)
    if tensor.dtype is torch.bfloat16:  # unknown to numpy
        bits = detached.view(torch.int16).numpy()
        kept.append(bits)
        return openvino.Tensor(bits, openvino.Shape(list(tensor.shape)), openvino.Type.bf16)
    return openvino.Tensor(detached.numpy(), shared_memory=True)


def openvino_layers(layers: Sequence[nn.Module], input: Tensor, threads: int) -> OpenVinoRun:
    """The layers in OpenVINO, in the input's dtype and its memory format."""
    import openvino
    from openvino import opset13 as ops

    kept: list[Any] = []

    def constant(value: Tensor) -> Any:
        return ops.constant(shared(value.contiguous(), kept), shared_memory=True)

    last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    placed = input.permute(0, 2, 3, 1) if last else input
    placed = placed.contiguous()
    kind = {torch.float32: openvino.Type.f32, torch.bfloat16: openvino.Type.bf16}[input.dtype]
    parameter = ops.parameter(list(placed.shape), kind)
    hidden = ops.transpose(parameter, ops.constant([0, 3, 1, 2])) if last else parameter
    for layer in layers:
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        if isinstance(layer, nn.Conv2d):
            window = list(layer.stride), _paddings(layer), _paddings(layer), list(layer.dilation)
            if layer.groups > 1:
                grouped = layer.weight.unflatten(0, (layer.groups, -1))
                hidden = ops.group_convolution(hidden, constant(grouped), *window)
            else:
                hidden = ops.convolution(hidden, constant(layer.weight), *window)
        else:
            hidden = ops.matmul(hidden, constant(layer.weight), False, True)
        if layer.bias is not None:
            hidden = ops.add(hidden, constant(layer.bias.reshape(1, -1, *[1] * (input.dim() - 2))))
    hidden = ops.transpose(hidden, ops.constant([0, 2, 3, 1])) if last else hidden
    model = openvino.Model([ops.result(hidden)], [parameter])
    view = (lambda output: output.permute(0, 3, 1, 2)) if last else None
    return OpenVinoRun(model, placed, threads, input.dtype, view, kept)
