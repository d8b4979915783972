// Runs an ONNX model in ONNX Runtime Web's WebAssembly for polyexport, by frames (see ../frames.cjs).
//
//     node run.cjs FOLDER_OF_NODE_MODULES MODEL_ONNX THREADS
const fs = require("fs");
const { loader, serve, start } = require("../frames.cjs");

const ort = loader()("onnxruntime-web"); // finds its .wasm file beside itself

const TYPED = {
  float32: Float32Array, float64: Float64Array, float16: Uint16Array, bool: Uint8Array,
  int8: Int8Array, int16: Int16Array, int32: Int32Array, int64: BigInt64Array,
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, uint64: BigUint64Array,
};

start(async () => {
  ort.env.wasm.numThreads = Number(process.argv[4]);
  const model = fs.readFileSync(process.argv[3]);
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  await serve(async (header, given) => {
    const feed = {};
    for (const [i, { name, dtype, shape }] of header.arrays.entries())
      if (session.inputNames.includes(name)) feed[name] = new ort.Tensor(dtype, new TYPED[dtype](given[i]), shape);
    const made = await session.run(feed, header.outputs);
    return header.outputs.map((name) => ({ name, dtype: made[name].type, shape: made[name].dims, values: made[name].data }));
  });
});
