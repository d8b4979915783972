// As npm installed it, LiteRT.js names another package in a way that a page cannot resolve; the address of a copy that names
// its file.
async function resolved(folder) {
  const found = await fetch(`${folder}dist/index.js`);
  if (!found.ok) throw new Error(`${found.status}`);
  const other = JSON.stringify(new URL("../wasm-utils/dist/index.js", folder).href);
  const text = (await found.text()).replaceAll('"@litertjs/wasm-utils"', other);
  return URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
}

// `?backend=webgpu` runs it on the GPU where the browser has WebGPU.
async function open() {
  const accelerator = new URLSearchParams(location.search).get("backend") || "wasm";
  const { loadAndCompile, Tensor } = await fromAnywhere(async (folder) => {
    const found = await import(folder.startsWith(CDN) ? `${folder}+esm` : await resolved(folder));
    await found.loadLiteRt(`${folder}wasm/`);
    return found;
  });
  const model = await loadAndCompile("./model.tflite", { accelerator });
  const taken = new Set(model.getInputDetails().map(({ name }) => name));
  const typed = (dtype, values) =>
    dtype === "uint8" ? Uint8Array.from(values) : /float/.test(dtype) ? Float32Array.from(values) : Int32Array.from(values);
  return async (given) => {
    const feed = {};
    for (const { name, dtype, values, shape } of given)
      if (taken.has(name)) feed[name] = new Tensor(typed(dtype, values), shape);
    const made = await model.run(feed);
    const answers = [];
    for (const [name, tensor] of Object.entries(made)) {
      const here = await tensor.copyTo("wasm");
      answers.push({ name, shape: Array.from(tensor.type.layout.dimensions), values: Array.from(here.toTypedArray()) });
      here.delete();
    }
    for (const tensor of [...Object.values(feed), ...Object.values(made)]) tensor.delete();
    return answers;
  };
}
