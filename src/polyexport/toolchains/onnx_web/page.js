// `?backend=webgpu` runs it on the GPU where the browser has WebGPU.
async function open() {
  const backend = new URLSearchParams(location.search).get("backend") || "wasm";
  const ort = await fromAnywhere(async (folder) => {
    const found = await import(`${folder}dist/ort.${backend}.min.mjs`);
    found.env.wasm.wasmPaths = `${folder}dist/`;
    return found;
  });
  const ARRAYS = {
    float32: Float32Array, float64: Float64Array, bool: Uint8Array, uint8: Uint8Array, int8: Int8Array,
    int16: Int16Array, int32: Int32Array, int64: BigInt64Array,
  };
  const session = await ort.InferenceSession.create("./model.onnx", { executionProviders: [backend] });
  return async (given) => {
    const feed = {};
    for (const { name, dtype, values, shape } of given) {
      const array = dtype === "int64" ? Array.from(values, BigInt) : values;
      if (session.inputNames.includes(name)) feed[name] = new ort.Tensor(dtype, ARRAYS[dtype].from(array), shape);
    }
    const made = await session.run(feed);
    return session.outputNames.map((name) => ({
      name, shape: Array.from(made[name].dims), values: Array.from(made[name].data, Number),
    }));
  };
}
