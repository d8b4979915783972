// Runs a TensorFlow Lite model in LiteRT.js's WebAssembly for polyexport, by frames (see ../frames.cjs).
//
//     node run.cjs FOLDER_OF_NODE_MODULES MODEL_TFLITE
const fs = require("fs");
const path = require("path");
const vm = require("vm");
const { loader, serve, start } = require("../frames.cjs");

const main = loader().resolve("@litertjs/core");
const wasm = path.join(path.dirname(main), "..", "wasm", path.sep);

// It is made for pages and loads a script by its address; Emscripten's part of it knows Node, as a CommonJS module.
Object.assign(globalThis, { self: globalThis, require, __dirname: wasm, __filename: path.join(wasm, "litert.js") });
globalThis.importScripts = (file) => vm.runInThisContext(fs.readFileSync(String(file), "utf8"));

const KINDS = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array };

start(async () => {
  const { loadAndCompile, loadLiteRt, Tensor } = await import(require("url").pathToFileURL(main));
  await loadLiteRt(wasm);
  const model = await loadAndCompile(new Uint8Array(fs.readFileSync(process.argv[3])), { accelerator: "wasm" });
  const inputs = new Set(model.getInputDetails().map(({ name }) => name));
  await serve(async (header, given) => {
    const feed = {};
    for (const [i, { name, dtype, shape }] of header.arrays.entries())
      if (inputs.has(name)) feed[name] = new Tensor(new KINDS[dtype](given[i]), shape);
    const made = await model.run(feed);
    const answers = header.outputs.map((name) => {
      const values = made[name].toTypedArray().slice();
      return { name, dtype: made[name].type.dtype, shape: Array.from(made[name].type.layout.dimensions), values };
    });
    for (const tensor of [...Object.values(feed), ...Object.values(made)]) tensor.delete();
    return answers;
  });
});
