// Runs a TensorFlow.js graph model for polyexport: frames on standard input are answered on standard output.
//
//     node run.cjs FOLDER_OF_NODE_MODULES MODEL_JSON
//
// A frame is the length of a JSON header (uint32, little-endian), the header, and the bytes of the arrays it lists:
// {"arrays": [{"name", "dtype", "shape", "bytes"}], "outputs": [names], "backend": "cpu" or "wasm"}, or as an answer
// {"arrays", "peak_memory_bytes"} or {"error": text}. dtype is one of TensorFlow.js: float32, int32, bool (one byte each).
// The first answer, of no arrays, comes unasked, once the model is loaded.
const fs = require("fs");
const path = require("path");
const load = require("module").createRequire(path.join(process.argv[2], "/"));

const write = fs.writeSync.bind(null, 1);
console.log = console.info = console.warn; // standard output is for frames

const tf = load("@tensorflow/tfjs-core");
load("@tensorflow/tfjs-backend-cpu");
load("@tensorflow/tfjs-backend-wasm"); // finds its .wasm files beside itself
const { loadGraphModel } = load("@tensorflow/tfjs-converter");

function readExactly(count) {
  const buffer = Buffer.alloc(count);
  let done = 0;
  while (done < count) {
    let got;
    try {
      got = fs.readSync(0, buffer, done, count - done, null);
    } catch (error) {
      if (error.code === "EAGAIN") continue;
      throw error;
    }
    if (got === 0) return null;
    done += got;
  }
  return buffer;
}

function writeAll(buffer) {
  let done = 0;
  while (done < buffer.length) {
    try {
      done += write(buffer, done, buffer.length - done);
    } catch (error) {
      if (error.code !== "EAGAIN") throw error;
    }
  }
}

function answer(header, chunks) {
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(4);
  length.writeUInt32LE(text.length);
  writeAll(Buffer.concat([length, text, ...chunks]));
}

function decode(bytes, dtype) {
  const copy = new Uint8Array(bytes).buffer; // aligned
  return dtype === "float32" ? new Float32Array(copy) : dtype === "int32" ? new Int32Array(copy) : new Uint8Array(copy);
}

function modelFromDisk(file) {
  const json = JSON.parse(fs.readFileSync(file, "utf8"));
  const weights = json.weightsManifest.flatMap((group) =>
    group.paths.map((name) => fs.readFileSync(path.join(path.dirname(file), name))));
  const joined = Buffer.concat(weights);
  return {
    json,
    handler: tf.io.fromMemory({
      modelTopology: json.modelTopology,
      weightSpecs: json.weightsManifest.flatMap((group) => group.weights),
      weightData: joined.buffer.slice(joined.byteOffset, joined.byteOffset + joined.length),
      signature: json.signature,
      userDefinedMetadata: json.userDefinedMetadata,
      modelInitializer: json.modelInitializer,
    }),
  };
}

async function main() {
  await tf.setBackend("cpu");
  await tf.ready();
  const { json, handler } = modelFromDisk(process.argv[3]);
  const model = await loadGraphModel(handler);
  const { inputs, outputs } = json.signature;
  answer({ arrays: [] }, []);
  for (;;) {
    const size = readExactly(4);
    if (size === null) return;
    const header = JSON.parse(readExactly(size.readUInt32LE()).toString());
    const given = header.arrays.map((array) => decode(readExactly(array.bytes), array.dtype));
    try {
      // the weights move along with the first call
      if (!(await tf.setBackend(header.backend))) throw new Error(`no ${header.backend} backend on this machine`);
      const feed = {};
      for (const [i, array] of header.arrays.entries()) {
        const known = inputs[array.name];
        if (known) feed[known.name] = tf.tensor(given[i], array.shape, array.dtype);
      }
      const wanted = header.outputs.map((name) => outputs[name].name);
      const made = [].concat(await model.executeAsync(feed, wanted));
      const arrays = [];
      const chunks = [];
      for (const [i, tensor] of made.entries()) {
        const values = await tensor.data();
        const bytes = Buffer.from(values.buffer, values.byteOffset, values.byteLength);
        arrays.push({ name: header.outputs[i], dtype: tensor.dtype, shape: tensor.shape, bytes: bytes.length });
        chunks.push(bytes);
      }
      answer({ arrays, peak_memory_bytes: process.resourceUsage().maxRSS * 1024 }, chunks);
      tf.dispose([Object.values(feed), made]);
    } catch (error) {
      console.error(error);
      answer({ error: String((error && error.message) || error) }, []);
    }
  }
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
