/** The current request as code: Python, JavaScript and curl. */

/** @typedef {{id: string, title: string, code: string}} Snippet */

const PYTHON_KEY = "# FAL_KEY in the environment must be this server's API key";
const PYTHON_NO_KEY = `import os

# the client requires a key, this server does not
os.environ.setdefault("FAL_KEY", "any")`;

const EXAMPLE_REGION = { x1: 100, y1: 100, x2: 200, y2: 200 };

/**
 * Writes a request as code.
 * @param {object} request
 * @param {string} request.server URL of the server, with a trailing slash
 * @param {string} request.endpoint such as "fal-ai/florence-2-large/ocr"
 * @param {string} request.model the model of the server
 * @param {boolean} request.auth whether the server requires an API key
 * @param {string} request.fileName
 * @param {string} request.contentType
 * @param {string} [request.text] for a task that needs text
 * @param {string[]} [request.classes] for a list of classes
 * @param {import("./client.js").Region | null} [request.region] for a task that needs a region; null if none is given yet
 * @returns {Snippet[]}
 */
export function writeSnippets(request) {
  return [
    { id: "python", title: "Python", code: python(request) },
    { id: "in-process", title: "Python, no server", code: inProcess(request) },
    { id: "javascript", title: "JavaScript", code: javascript(request) },
    { id: "curl", title: "curl", code: curl(request) },
  ];
}

function python(request) {
  const { server, endpoint, auth, fileName } = request;
  return `${auth ? PYTHON_KEY : PYTHON_NO_KEY}
import fal_client

# this server instead of fal.run
fal_client.client.RUN_URL_FORMAT = ${quote(server)}

result = fal_client.run(
    ${quote(endpoint)},
    arguments={
        "image_url": fal_client.encode_file(${quote(fileName)}),${pythonInput(request)}
    },
)
print(result["results"])
`;
}

function inProcess(request) {
  return `from florence_onnx import fal

# a bundle directory or a hub repository
fal.configure(model=${quote(request.model)})

result = fal.run(
    ${quote(request.endpoint)},
    arguments={
        "image_url": fal.encode_file(${quote(request.fileName)}),${pythonInput(request)}
    },
)
print(result["results"])
`;
}

function javascript(request) {
  const { server, endpoint, auth, fileName, contentType } = request;
  return `import { readFile } from "node:fs/promises";
import { createFalClient } from "@fal-ai/client";

const fal = createFalClient({
  // ${auth ? "this server's API key" : "the client requires credentials, this server does not"}
  credentials: ${auth ? "process.env.FAL_KEY" : '"any"'},
  requestMiddleware: async (request) => ({
    ...request,
    url: request.url.replace("https://fal.run/", ${quote(server)}),
  }),
});

const image = await readFile(${quote(fileName)}, "base64");
const { data } = await fal.run(${quote(endpoint)}, {
  input: {
    image_url: \`data:${contentType};base64,\${image}\`,${javascriptInput(request)}
  },
});
console.log(data.results);
`;
}

/** The body goes through stdin, because images exceed the maximum length of a command line. */
function curl(request) {
  const { server, endpoint, auth, fileName, contentType } = request;
  const fields = [
    `"image_url": "data:${contentType};base64,$(base64 < ${quoteForShell(fileName)} | tr -d '\\n')"`,
    ...inputs(request).map(([name, value]) => `${quote(name)}: ${escapeInHeredoc(spaced(value))}`),
  ];
  return `curl ${quoteForShell(server + endpoint)} \\
${auth ? '  -H "Authorization: Key $FAL_KEY" \\\n' : ""}  -H "Content-Type: application/json" \\
  --data-binary @- <<JSON
{${fields.join(",\n ")}}
JSON
`;
}

/** The arguments besides the image, by their names in the API; an example if the region is not given yet. */
function inputs({ text, classes, region }) {
  return [
    ...(classes === undefined ? [] : [["classes", classes]]),
    ...(text === undefined ? [] : [["text_input", text]]),
    ...(region === undefined ? [] : [["region", region ?? EXAMPLE_REGION]]),
  ];
}

const pythonInput = (request) => inputs(request).map(([name, value]) => `\n        ${quote(name)}: ${spaced(value)},`).join("");

const javascriptInput = (request) => inputs(request).map(([name, value]) => `\n    ${name}: ${spaced(value)},`).join("");

/** A JSON string is a valid string literal in Python and JavaScript too. */
const quote = (text) => JSON.stringify(text);

const spaced = (value) =>
  typeof value === "string" || Array.isArray(value) ? quote(value) : `{${Object.entries(value).map(([name, part]) => `"${name}": ${part}`).join(", ")}}`;

const quoteForShell = (text) => (/^[\w.@%+=:,/-]+$/.test(text) ? text : `'${text.replaceAll("'", String.raw`'\''`)}'`);

const escapeInHeredoc = (text) => text.replace(/[\\$`]/g, String.raw`\$&`);
