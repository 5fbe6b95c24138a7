// Submits a workflow to one GPU or to whichever is free, follows its progress, and fetches its images.
//
// usage: node docs/examples/submit.mjs WORKFLOW.json [--url http://127.0.0.1:8188] [--gpu 2] [--output FOLDER]
//
// WORKFLOW.json is what ComfyUI's menu "Export (API)" saves. Needs Node 18 or newer, and no package.

import { mkdir, readFile, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { parseArgs } from "node:util";

const POLL_MS = 250;
const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    url: { type: "string", default: "http://127.0.0.1:8188" },
    gpu: { type: "string", default: "auto" }, // a slot's number, or auto
    output: { type: "string", default: "." },
  },
});

/** The reply; a refusal ends the program with what the server says. */
async function call(path, init = {}) {
  const reply = await fetch(options.url + path, init);
  if (!reply.ok) throw new Error(`${reply.status}: ${await reply.text()}`);
  return reply;
}

/** Queue a job; its id. */
async function submit(workflow) {
  const reply = await call("/prompt", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-TARGET-GPU": options.gpu },
    body: JSON.stringify({ prompt: workflow }),
  });
  const { prompt_id, gpu_id } = await reply.json();
  console.log(`job ${prompt_id} is queued for ${gpu_id ?? "any slot"}`);
  return prompt_id;
}

/** Show the job's progress, from the server's live data, until `signal` says that it has ended. */
async function follow(promptId, signal) {
  let text = "";
  try {
    const reply = await call("/parallel/events", { signal });
    const decoder = new TextDecoder();
    for await (const chunk of reply.body) {
      text += decoder.decode(chunk, { stream: true });
      const events = text.split("\n\n");
      text = events.pop();
      events.forEach((event) => show(event, promptId));
    }
  } catch (error) {
    if (!signal.aborted) throw error;
  }
}

function show(event, promptId) {
  const line = event.split("\n").find((each) => each.startsWith("data: "));
  const parts = line ? JSON.parse(line.slice("data: ".length)).parts : {};
  for (const [name, slot] of Object.entries(parts)) {
    if (!name.startsWith("slot/") || slot.job?.prompt_id !== promptId) continue;
    const { node, value, max } = slot.job;
    console.log(`${name.replace("/", " ")}: ${node ?? "starts"}${max ? `, step ${value} of ${max}` : ""}`);
  }
}

/** What the history holds of the job, once it has ended. */
async function ended(promptId) {
  for (;;) {
    const history = await (await call(`/history/${promptId}`)).json();
    if (history[promptId]) return history[promptId];
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

async function fetchImages(job) {
  await mkdir(options.output, { recursive: true });
  const images = Object.values(job.outputs).flatMap((output) => output.images ?? []);
  for (const image of images) {
    const reply = await call(`/view?${new URLSearchParams(image)}`);
    const path = join(options.output, basename(image.filename));
    await writeFile(path, Buffer.from(await reply.arrayBuffer()));
    console.log(`saved ${path}`);
  }
}

if (positionals.length !== 1) {
  console.error("usage: node docs/examples/submit.mjs WORKFLOW.json [--url URL] [--gpu 2] [--output FOLDER]");
  process.exit(2);
}
try {
  const promptId = await submit(JSON.parse(await readFile(positionals[0], "utf-8")));
  const stop = new AbortController();
  const following = follow(promptId, stop.signal);
  following.catch(() => {}); // Told below, when the job has ended.
  const job = await ended(promptId);
  stop.abort();
  await following;
  console.log(`it ran on slot ${job.gpu_id}: ${job.status.status_str}`);
  await fetchImages(job);
} catch (error) {
  console.error(error.message);
  process.exit(1);
}
