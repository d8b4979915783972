// Frames of arrays on standard input and output, by which polyexport runs a model in Node.
//
// A frame is the length of a JSON header (uint32, little-endian), the header, and the bytes of the arrays it lists:
// {"arrays": [{"name", "dtype", "shape", "bytes"}], "outputs": [names], ...}, or as an answer
// {"arrays", "peak_memory_bytes"} or {"error": text}. dtype is numpy's word for it.
// The first answer, of no arrays, comes unasked, once the model is loaded.
const fs = require("fs");

const write = fs.writeSync.bind(null, 1);
console.log = console.info = console.warn; // standard output is for frames

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

// Answers frames until there are no more. `run` takes a header and the bytes of its arrays, each in an ArrayBuffer of its
// own, and gives [{name, dtype, shape, values}].
async function serve(run) {
  answer({ arrays: [] }, []);
  for (;;) {
    const size = readExactly(4);
    if (size === null) return;
    const header = JSON.parse(readExactly(size.readUInt32LE()).toString());
    const given = header.arrays.map((array) => new Uint8Array(readExactly(array.bytes)).buffer);
    try {
      const made = await run(header, given);
      const chunks = made.map(({ values }) => Buffer.from(values.buffer, values.byteOffset, values.byteLength));
      const arrays = made.map(({ name, dtype, shape }, i) => ({ name, dtype, shape, bytes: chunks[i].length }));
      answer({ arrays, peak_memory_bytes: process.resourceUsage().maxRSS * 1024 }, chunks);
    } catch (error) {
      console.error(error);
      answer({ error: String((error && error.message) || error) }, []);
    }
  }
}

// Loads a package of the folder that was named first on the command line.
function loader() {
  return require("module").createRequire(require("path").join(process.argv[2], "/"));
}

// Runs `main`, and ends the process with it, whatever threads a runtime has left.
function start(main) {
  main().then(
    () => process.exit(0),
    (error) => {
      console.error(error);
      process.exit(1);
    },
  );
}

module.exports = { loader, serve, start };
