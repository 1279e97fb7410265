// transformers.js in Node on our four-graph export: `node transformers_js.mjs JOB FOLDER` prints the line that worker.py describes.
//
// FOLDER is where `npm install @huggingface/transformers` ran. Greedy only: transformers.js accepts num_beams and ignores it. Its
// generate() cannot take image features, so a second task runs the vision encoder again. To time the stages of an answer separately,
// encode_image() is replaced by a function that returns features computed just before.
import fs from 'node:fs';
import path from 'node:path';
import { createRequire } from 'node:module';

const NUM_FIRST_TOKENS = 2;
const job = JSON.parse(process.argv[2]);
const { workload } = job;
const require = createRequire(path.resolve(process.argv[3], 'package.json'));
const { env, AutoProcessor, AutoTokenizer, Florence2ForConditionalGeneration, RawImage } = require('@huggingface/transformers');

env.allowRemoteModels = false;
env.localModelPath = path.dirname(job.model) + '/';
const name = path.basename(job.model);
const session_options = { intraOpNumThreads: workload.threads, interOpNumThreads: 1, logSeverityLevel: 3 };
const model = await Florence2ForConditionalGeneration.from_pretrained(name, { dtype: 'fp32', device: 'cpu', session_options });
const tokenizer = await AutoTokenizer.from_pretrained(name);
const processor = await AutoProcessor.from_pretrained(name);
const encodeImage = model.encode_image.bind(model);

const now = () => performance.now() / 1000;
const sinceStart = () => Date.now() / 1000 - job.started;
const load_s = sinceStart();

const preprocess = async (image = workload.image) => (await processor.image_processor(await RawImage.read(image))).pixel_values;
const vision = async (pixel_values) => {
    const found = await encodeImage({ pixel_values });
    return found.image_features ?? found;
};

async function answer(pixel_values, features, prompt, num_tokens) {
    model.encode_image = async () => features;
    const output = await model.generate({
        ...tokenizer(prompt.text),
        ...workload.generation,
        pixel_values,
        do_sample: false,
        num_beams: 1,
        max_new_tokens: num_tokens,
        min_new_tokens: num_tokens - 1,
    });
    return Array.from(output.data, Number).slice(1);
}

async function ask(note, prompt = workload.first) {
    const times = [now()];
    const pixel_values = await preprocess();
    times.push(now());
    const image_features = await vision(pixel_values);
    times.push(now());
    await answer(pixel_values, image_features, prompt, workload.num_tokens);
    times.push(now());
    note('preprocess', times[1] - times[0]);
    note('vision', times[2] - times[1]);
    note('answer_greedy', times[3] - times[2]);
    note('end_to_end_greedy', times[3] - times[0]);
    return { pixel_values, image_features };
}

const stages = {};
const note = (stage, seconds) => (stages[stage] ??= []).push(seconds);
const ignore = () => {};

await ask(ignore);
const cold_start_s = sinceStart();
const resized = await preprocess(workload.resized_image);
const tokens = await answer(resized, await vision(resized), workload.first, workload.num_tokens);
for (let repeat = 0; repeat < workload.repeats; ++repeat) {
    const asked = await ask(note);
    let start = now();
    await answer(asked.pixel_values, asked.image_features, workload.first, NUM_FIRST_TOKENS);
    note('first_tokens_greedy', now() - start);
    start = now();
    await ask(ignore, workload.second);
    note('second_task', now() - start);
}

const status = fs.existsSync('/proc/self/status') ? fs.readFileSync('/proc/self/status', 'utf-8') : '';
const peak = status.match(/VmHWM:\s+(\d+)/)?.[1] ?? process.resourceUsage().maxRSS;
const version = (of) => JSON.parse(fs.readFileSync(path.join(process.argv[3], 'node_modules', of, 'package.json'), 'utf-8')).version;
console.log(JSON.stringify({
    stages,
    tokens: { greedy: tokens },
    load_s,
    cold_start_s,
    peak_rss_bytes: Number(peak) * 1024,
    versions: {
        node: process.version,
        'transformers.js': version('@huggingface/transformers'),
        'onnxruntime-node': version('onnxruntime-node'),
    },
    notes: ['no beam search: num_beams is ignored', 'resizes with sharp, whose pixels differ slightly: its tokens are compared on an image that was resized beforehand'],
}));
