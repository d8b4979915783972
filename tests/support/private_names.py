"""Every name of another library that we use though it is private or undocumented, so that a release may take it away.

A name is `module:path`: what the path leads to from the module, or, where an instance gets it, what the source of
its class or module says. In a toolchain, `python private_names.py TOOLCHAIN` prints those that are lost there, as JSON.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Mapping

HOST = "host"
"""The environment of training, in place of a toolchain's name."""

MIL = "coremltools.converters.mil"

NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    HOST: {
        "capture/answer.py": (
            "torch.nn.modules.module:_global_forward_hooks",
            "torch.nn.modules.module:_global_forward_pre_hooks",
        ),
        "capture/changes.py": (
            *(
                f"torch.nn:Module.{name}"
                for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
            ),
            *(f"torch.nn:Module.{name}" for name in ("_forward_hooks", "_forward_pre_hooks")),
            "torch:Tensor._version",
        ),
        "engine/weights.py": ("torch.nn:Module._non_persistent_buffers_set", "torch.nn:Module._parameters"),
        "capture/dtypes.py": ("torch.amp.autocast_mode:autocast._enabled",),
        "capture/sharded.py": ("torch.distributed.checkpoint.format_utils:dcp_to_torch_save",),
        "capture/calls.py": ("torch.utils._pytree:tree_leaves",),
        "capture/rebuilt.py": (
            "transformers.utils.output_capturing:_CAN_RECORD_REGISTRY",
            "transformers.modeling_utils:PreTrainedModel._can_record_outputs",
        ),
        "capture/weights.py": ("torch.nn:Module._metadata",),
        "capture/part_names.py": (
            "torch.nn:Module._modules",
            "torch.nn:Module._parameters",
            "torch.nn:Module._buffers",
        ),
        "capture/exported_graph.py": (
            "torch._ops:OpOverload",
            "torch.fx:Graph._codegen",
            "torch.export._unlift:_guards_fn",
            *(
                f"torch.nn:Module.{name}"
                for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
            ),
        ),
        "capture/unwrap.py": (
            "torch.utils._pytree:treespec_leaf",
            "torch.nn:Module._modules",
            "torch.nn:Module._parameters",
            "torch.nn:Module._backward_hooks",
            "torch.nn:Conv2d._conv_forward",
            "torch.ao.nn.intrinsic.qat:ConvBn2d._forward",
            "torch.nn:Module._backward_pre_hooks",
            "torch.nn:Module._compiled_call_impl",
            "lightning.pytorch.utilities.compile:_compiler_ctx",
            "torch.jit._script:_torchdynamo_inline",
            "torch._dynamo.eval_frame:OptimizedModule._orig_mod",
            "torch._dynamo.eval_frame:_torchdynamo_orig_callable",
            "torch.distributed.fsdp._common_utils:_fsdp_flattened",
            "torch.distributed._composable.contract:__composable_api_state_key",
        ),
        "coreml/patches/arithmetic_ops.py": (
            f"{MIL}.frontend.torch.ops:_get_inputs",
            f"{MIL}.frontend.torch.ops:_get_kwinputs",
            f"{MIL}.frontend.torch.ops:_construct_matmul",
            f"{MIL}.frontend.torch.ops:promote_input_dtypes",
        ),
        "coreml/patches/composite_ops.py": (
            f"{MIL}.frontend.torch.ops:NUM_TO_DTYPE_STRING",
            f"{MIL}.mil.types.symbolic:any_symbolic",
            f"{MIL}:register_torch_op",
        ),
        "coreml/patches/size_ops.py": (f"{MIL}.frontend.torch.ops:_int", f"{MIL}.frontend.torch.ops:_get_inputs"),
        "coreml/patches/fourier.py": (
            f"{MIL}.mil.passes.defs.lower_complex_dialect_ops:_fft_1d",
            f"{MIL}.mil.ops.defs.complex_dialect_ops:fft_canonicalize_length_dim",
        ),
        "coreml/patches/high_rank_pass.py": (
            f"{MIL}.mil.passes.graph_pass:AbstractGraphPass",
            f"{MIL}.mil.passes.pass_registry:register_pass",
            f"{MIL}.mil.types.symbolic:is_symbolic",
        ),
        "coreml/patches/truth_pass.py": (f"{MIL}.mil.passes.defs.optimize_repeat_ops:cast_optimization",),
        "coreml/program.py": ("coremltools.libmilstoragepython:_BlobStorageReader",),
        "formats/coreml.py": (
            "torch._decomp:decomposition_table",
            f"{MIL}.frontend.torch.torch_op_registry:is_torch_fx_node_supported",
            f"{MIL}.mil.passes.defs.preprocess:NameSanitizer",
        ),
        "formats/coreml_quantized.py": (
            "coremltools.optimize.coreml._post_training_quantization:_get_activation_calibration_stats",
            "coremltools.optimize.coreml._quantization_passes:insert_prefix_quantize_dequantize_pair.transform_op",
            f"{MIL}.mil.passes.defs.optimize_activation_quantization:"
            "insert_suffix_quantize_dequantize_pair._insert_quantize_dequantize",
        ),
        "formats/aoti.py": (
            "torch._inductor:aot_compile",
            "torch._inductor:aoti_load_package",
            "torch._inductor:list_options",
            "torch._inductor.package.package:package_aoti",
        ),
        "formats/torchscript.py": ("torch._ops:OpOverload._schema",),
        "measure/size_branches.py": ("torch._subclasses.fake_tensor:FakeTensorMode",),
        "measure/noise.py": ("torch.utils._python_dispatch:TorchDispatchMode",),
        "tracing/attention.py": (
            "torch.nn.modules.transformer:_detect_is_causal_mask",
            "torch.nn.functional:_in_projection_packed",
        ),
        "tracing/draws.py": (
            "torch._C:_get_tracing_state",
            "torch._C:_set_tracing_state",
            "torch.utils._python_dispatch:_disable_current_modes",
        ),
        "tracing/exportable.py": (
            "torch.distributions:Distribution._validate_args",
            "transformers.configuration_utils:PretrainedConfig._experts_implementation",
        ),
        "tracing/fake_quantization.py": ("torch.ao.quantization.fx._decomposed:quantize_per_tensor",),
        "tracing/exported_program.py": (
            "torch:_C._set_grad_enabled",
            "torch._ops:OpOverload._overloadname",
            "torch._ops:OpOverload._schema",
            "torch._subclasses.fake_tensor:DataDependentOutputException",
            "torch.fx.experimental.symbolic_shapes:GuardOnDataDependentSymNode",
        ),
        "tracing/decompositions/packed.py": (
            "torch:_VF._pack_padded_sequence",
            "torch:_VF._pad_packed_sequence",
            "torch.nn.modules.rnn:RNNBase.check_forward_args",
            "torch.nn.modules.rnn:LSTM.check_forward_args",
        ),
        "tracing/image_operators.py": ("torch:ops.aten._native_batch_norm_legit_no_training",),
        "tracing/products.py": ("torch:ops.aten._unsafe_view",),
        "tracing/reads.py": ("torch:_assert", "torch:_check", "torch:_check_value", "torch:_check_with"),
        "tracing/sizes.py": ("torch._C:_get_value_trace", "torch._C:_is_tracing"),
        "lightning_export/answers.py": ("torch.nn.modules.module:_global_forward_hooks_with_kwargs",),
        "lightning_export/watch.py": ("torch.nn:Module._wrapped_call_impl", "torch.nn:Module._forward_pre_hooks"),
        "lightning_export/best.py": ("lightning.pytorch.callbacks:ModelCheckpoint._last_global_step_saved",),
        "lightning_export/callback.py": ("lightning.pytorch.callbacks:Callback._generate_state_key",),
        "lightning_export/trainer.py": (
            "lightning.pytorch.loops.evaluation_loop:_EvaluationLoop._data_source",
            "lightning.pytorch:LightningModule._trainer",
        ),
        "lightning_export/capture.py": ("torch._subclasses.fake_tensor:FakeTensor",),
        "lightning_export/loggers.py": (
            "lightning.pytorch.loggers:WandbLogger._checkpoint_name",
            "lightning.pytorch.loggers:WandbLogger._log_model",
        ),
        "lightning_export/metrics.py": ("lightning.pytorch:LightningModule._metric_attributes",),
        "lightning_export/ranks.py": ("torch.distributed.distributed_c10d:_get_default_store",),
    },
    "c": {"formats/c.py": ("emx_onnx_cgen.onnx_import:_node_attrs",)},
    "executorch": {
        "formats/executorch.py": (
            "executorch.backends.xnnpack.partition.graphs.bilinear_2d:get_graphs_dict",
            "executorch.backends.xnnpack.partition.graphs.sdpa:get_graphs",
            "executorch.exir._serialize._program:deserialize_pte_binary",
            *(
                f"executorch.exir.emit._emitter:_Emitter.{name}"
                for name in ("_emit_scan", "_get_operator", "_emit_evalue")
            ),
            "executorch.extension.pybindings.portable_lib:_threadpool_get_thread_count",
            "executorch.extension.pybindings.portable_lib:_unsafe_reset_threadpool",
            "torch.fx.traceback:NodeSource",
        ),
        "formats/executorch_quantized.py": (
            "executorch.backends.xnnpack.partition.config.gemm_configs:ConvolutionConfig",
            "executorch.backends.xnnpack.serialization.xnnpack_graph_serialize:XNNHeader",
            "executorch.exir._serialize._flatbuffer:_flatc_decompile",
            "executorch.exir._serialize._program:deserialize_pte_binary",
            "torchao.quantization.pt2e.quantizer.quantizer:Q_ANNOTATION_KEY",
        ),
        "tracing/looped.py": ("torch._higher_order_ops.scan:scan",),
        "tracing/unrolled.py": ("torch._decomp:decomposition_table",),
    },
    "onnx": {"formats/onnx_fp16.py": ("onnxruntime.transformers.float16:convert_float_to_float16",)},
    "paddle": {
        "formats/paddle.py": ("x2paddle.convert:onnx2paddle",),
        "lowering/paddle/__init__.py": ("paddle:base.core.serialize_pir_program",),
        "lowering/paddle/inference.py": (
            "paddle:_C_ops",
            "paddle:base.libpaddle.pir",
            "paddle.autograd.backward_utils:ValueDict",
            "paddle.autograd.backward_utils:ValueSet",
            "paddle.autograd.backward_utils:get_real_op_inputs",
            "paddle.autograd.backward_utils:get_real_op_outputs",
            "paddle.autograd.backward_utils:some_in_set",
        ),
        "lowering/paddle/recurrent.py": ("paddle:_C_ops",),
        "lowering/paddle/weights.py": ("paddle:base.libpaddle.pir.create_shaped_type",),
    },
    "tensorflow": {
        "formats/graphdef.py": ("tensorflow.python.framework.convert_to_constants:convert_variables_to_constants_v2",),
        "formats/tfjs.py": ("tensorflowjs.converters.tf_saved_model_conversion_v2:_run_grappler",),
    },
    "tflite": {
        "formats/tflite.py": ("ai_edge_litert.interpreter:Interpreter._get_ops_details",),
        "formats/tflite_quantized.py": (
            "ai_edge_quantizer.utils.qsv_utils:min_max_update",
            "ai_edge_quantizer.utils.qsv_utils:moving_average_update",
            "ai_edge_quantizer.utils.tfl_flatbuffer_utils:read_model",
        ),
    },
}
"""By the environment that has the library, and the file that uses the name."""


def lost(names: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Those that this environment's libraries do not have, each with the file that uses it."""
    return [f"{name} ({file})" for file, used in names.items() for name in used if not is_there(name)]


def is_there(name: str) -> bool:
    """Whether a library has a name."""
    module, _, path = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    for part in path.split("."):
        inner = getattr(found, part, found)
        if inner is found and not re.search(rf"\b{part}\b", _source(found)):
            return False
        found = inner
    return True


def _source(found: object) -> str:
    """What a module or a class and those above it say; empty where they are no Python."""
    texts = []
    for each in getattr(found, "__mro__", (found,)):
        try:
            texts.append(inspect.getsource(each))
        except (OSError, TypeError):
            continue
    return "\n".join(texts)


if __name__ == "__main__":
    if sys.argv[1] == "tensorflow":  # it has tensorflowjs in part
        import bare  # noqa: F401 -- makes the next one possible
        from polyexport.formats.tfjs import import_tensorflowjs

        import_tensorflowjs()
    print(json.dumps(lost(NAMES[sys.argv[1]])))
