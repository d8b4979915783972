// Runs a TensorFlow.js graph model for polyexport, by frames (see ../frames.cjs) whose "backend" is "cpu" or "wasm".
//
//     node run.cjs FOLDER_OF_NODE_MODULES MODEL_JSON
//
// A dtype is one of TensorFlow.js: float32, int32, bool (one byte each).
const fs = require("fs");
const path = require("path");
const { loader, serve, start } = require("../frames.cjs");
const load = loader();

const tf = load("@tensorflow/tfjs-core");
load("@tensorflow/tfjs-backend-cpu");
load("@tensorflow/tfjs-backend-wasm"); // finds its .wasm files beside itself
const { loadGraphModel } = load("@tensorflow/tfjs-converter");

const TYPED = { float32: Float32Array, int32: Int32Array, bool: Uint8Array };

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

start(async () => {
  await tf.setBackend("cpu");
  await tf.ready();
  const { json, handler } = modelFromDisk(process.argv[3]);
  const model = await loadGraphModel(handler);
  const { inputs, outputs } = json.signature;
  await serve(async (header, given) => {
    // the weights move along with the first call
    if (!(await tf.setBackend(header.backend))) throw new Error(`no ${header.backend} backend on this machine`);
    const feed = {};
    for (const [i, array] of header.arrays.entries()) {
      const known = inputs[array.name];
      if (known) feed[known.name] = tf.tensor(new TYPED[array.dtype](given[i]), array.shape, array.dtype);
    }
    const made = [].concat(await model.executeAsync(feed, header.outputs.map((name) => outputs[name].name)));
    const answers = [];
    for (const [i, { dtype, shape }] of made.entries()) // the values of an empty tensor may be a plain array
      answers.push({ name: header.outputs[i], dtype, shape, values: TYPED[dtype].from(await made[i].data()) });
    tf.dispose([Object.values(feed), made]);
    return answers;
  });
});
