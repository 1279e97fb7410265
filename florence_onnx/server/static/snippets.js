/** The same question from Python, JavaScript and the shell. */

/** @typedef {{id: string, title: string, code: string}} Snippet */

const PYTHON_KEY = "# FAL_KEY in the environment must be this server's API key";
const PYTHON_NO_KEY = `import os

# the client wants a key, this server does not
os.environ.setdefault("FAL_KEY", "any")`;

const EXAMPLE_REGION = { x1: 100, y1: 100, x2: 200, y2: 200 };

/**
 * Writes the question as code, in four ways.
 * @param {object} question
 * @param {string} question.server address with a slash at the end
 * @param {string} question.endpoint such as "fal-ai/florence-2-large/ocr"
 * @param {string} question.model what the server runs
 * @param {boolean} question.auth whether the server wants a key
 * @param {string} question.fileName
 * @param {string} question.contentType
 * @param {string} [question.text] for a task that needs text
 * @param {import("./client.js").Region | null} [question.region] for a task that needs a region; null while there is none
 * @returns {Snippet[]}
 */
export function writeSnippets(question) {
  return [
    { id: "python", title: "Python", code: python(question) },
    { id: "in-process", title: "Python, no server", code: inProcess(question) },
    { id: "javascript", title: "JavaScript", code: javascript(question) },
    { id: "curl", title: "curl", code: curl(question) },
  ];
}

function python(question) {
  const { server, endpoint, auth, fileName } = question;
  return `${auth ? PYTHON_KEY : PYTHON_NO_KEY}
import fal_client

# this server instead of fal.run
fal_client.client.RUN_URL_FORMAT = ${quote(server)}

answer = fal_client.run(
    ${quote(endpoint)},
    arguments={
        "image_url": fal_client.encode_file(${quote(fileName)}),${pythonInput(question)}
    },
)
print(answer["results"])
`;
}

function inProcess(question) {
  return `from florence_onnx import fal

# a bundle's folder, or a repository of the hub
fal.configure(model=${quote(question.model)})

answer = fal.run(
    ${quote(question.endpoint)},
    arguments={
        "image_url": fal.encode_file(${quote(question.fileName)}),${pythonInput(question)}
    },
)
print(answer["results"])
`;
}

function javascript(question) {
  const { server, endpoint, auth, fileName, contentType } = question;
  return `import { readFile } from "node:fs/promises";
import { createFalClient } from "@fal-ai/client";

const fal = createFalClient({
  // ${auth ? "this server's API key" : "the client wants some, this server does not"}
  credentials: ${auth ? "process.env.FAL_KEY" : '"any"'},
  requestMiddleware: async (request) => ({
    ...request,
    url: request.url.replace("https://fal.run/", ${quote(server)}),
  }),
});

const image = await readFile(${quote(fileName)}, "base64");
const { data } = await fal.run(${quote(endpoint)}, {
  input: {
    image_url: \`data:${contentType};base64,\${image}\`,${javascriptInput(question)}
  },
});
console.log(data.results);
`;
}

/** The body goes through stdin: images are longer than a command line may be. */
function curl(question) {
  const { server, endpoint, auth, fileName, contentType } = question;
  const fields = [
    `"image_url": "data:${contentType};base64,$(base64 < ${quoteForShell(fileName)} | tr -d '\\n')"`,
    ...inputs(question).map(([name, value]) => `${quote(name)}: ${escapeInHeredoc(spaced(value))}`),
  ];
  return `curl ${quoteForShell(server + endpoint)} \\
${auth ? '  -H "Authorization: Key $FAL_KEY" \\\n' : ""}  -H "Content-Type: application/json" \\
  --data-binary @- <<JSON
{${fields.join(",\n ")}}
JSON
`;
}

/** What the task takes besides the image, as the API names it; examples where nothing was given yet. */
function inputs({ text, region }) {
  if (text !== undefined) return [["text_input", text]];
  return region === undefined ? [] : [["region", region ?? EXAMPLE_REGION]];
}

const pythonInput = (question) => inputs(question).map(([name, value]) => `\n        ${quote(name)}: ${spaced(value)},`).join("");

const javascriptInput = (question) => inputs(question).map(([name, value]) => `\n    ${name}: ${spaced(value)},`).join("");

/** A JSON string is a string of Python and JavaScript too. */
const quote = (text) => JSON.stringify(text);

const spaced = (value) =>
  typeof value === "string" ? quote(value) : `{${Object.entries(value).map(([name, part]) => `"${name}": ${part}`).join(", ")}}`;

const quoteForShell = (text) => (/^[\w.@%+=:,/-]+$/.test(text) ? text : `'${text.replaceAll("'", String.raw`'\''`)}'`);

const escapeInHeredoc = (text) => text.replace(/[\\$`]/g, String.raw`\$&`);
