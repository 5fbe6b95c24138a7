/** One card for each slot. */

import { el, keyed, setAttribute, setText, show } from "./dom.js";
import { jobShare } from "./job.js";
import { bytes, count, seconds, short, slotName, t } from "./text.js";

export function showSlots(parent, slots, feed, act) {
  keyed(parent, slots, (slot) => slot.gpu_id, (slot) => makeCard(slot.gpu_id, act), (card, slot) => updateCard(card, slot, feed, act));
}

function makeCard(id, act) {
  const button = (name, label, run) => el("button", { type: "button", className: name, "data-t": label, onclick: run });
  return el("article", { className: "slot", "aria-labelledby": `slot-${id}` },
    el("div", { className: "top" },
      el("h3", { id: `slot-${id}` }), el("span", { className: "device" }), el("span", { className: "state" })),
    el("p", { className: "note bad trouble", hidden: true }),
    el("div", { className: "job" },
      el("div", { className: "what" },
        el("div", { className: "node" }),
        el("div", { className: "bar progress", role: "progressbar" }, el("span")),
        el("div", { className: "row" }, el("span", { className: "step" }), el("time", { className: "ran" })),
        button("interrupt", "interrupt", (event) => act((does) => does.interrupt(event.currentTarget.dataset.id), "did.interrupt"))),
      el("img", { alt: "", hidden: true }), el("div", { className: "picture", "aria-hidden": "true" })),
    el("p", { className: "none job-none" }),
    el("div", {},
      el("div", { className: "row" }, el("span", { className: "memory-name" }), el("span", { className: "memory-text" })),
      el("div", { className: "bar memory", role: "meter", "aria-valuemin": "0", "aria-valuemax": "100" }, el("span"))),
    el("ul", { className: "chips" }),
    el("div", { className: "row" }, el("span", { className: "counts" }), el("span", { className: "pending" })),
    el("p", { className: "note steps" }),
    el("div", { className: "tools" },
      button("pause", "pause", () => act((does) => does.pause([id]), "did.pause")),
      button("resume", "resume", () => act((does) => does.resume([id]), "did.resume")),
      button("drain", "drain", () => act((does) => does.drain([id]), "did.drain")),
      button("preload", "preload", () => act.preload(id)),
      button("free", "free", () => act((does) => does.free(id), "did.free"))));
}

function updateCard(card, slot, feed, act) {
  const find = (name) => card.querySelector(`.${name}`);
  for (const button of card.querySelectorAll("button")) {
    setText(button, t(button.dataset.t));
    setAttribute(button, "aria-label", `${t(button.dataset.t)}: ${slotName(slot.gpu_id)}`);
  }
  setAttribute(card, "data-state", slot.state);
  setAttribute(card, "data-health", slot.health);
  setText(find("top").firstChild, slotName(slot.gpu_id));
  setText(find("device"), [slot.device, slot.device_name, kindOf(slot)].filter(Boolean).join(" · "));
  setAttribute(find("device"), "title", find("device").textContent);
  setText(find("state"), t(`state.${slot.state}`) + (slot.refuses_jobs ? ` · ${t("refuses")}` : ""));
  const isClosed = ["paused", "draining", "suspended", "failed"].includes(slot.state);
  show(find("pause"), !isClosed);
  show(find("resume"), isClosed);
  show(find("drain"), !slot.refuses_jobs);
  setText(find("trouble"), slot.error ?? "");
  show(find("trouble"), Boolean(slot.error));
  updateJob(card, find, slot, feed, act);
  updateMemory(find, slot);
  updateModels(find("chips"), slot.models);
  const metrics = slot.metrics;
  const ended = metrics.jobs_succeeded + metrics.jobs_failed + metrics.jobs_interrupted;
  setText(find("counts"), t("counts", { ended: count(ended), failed: count(metrics.jobs_failed), average: seconds(metrics.average_busy_seconds) }));
  setText(find("pending"), t("pending", { n: count(slot.pending) }));
  setText(find("steps"), stepsOf(slot.graphs));
}

/** Where the slot's jobs run, unless in the server's own process; and what that one does, unless it is ready. */
function kindOf(slot) {
  if (slot.worker === null || slot.worker === undefined) return "";
  return t(`kind.${slot.kind}`) + (slot.worker === "ready" ? "" : ` (${t(`worker.${slot.worker}`)})`);
}

/** Whether steps are recorded; nothing where that is not known, on another machine for example. */
function stepsOf(graphs) {
  if (graphs.on) return t("steps.on", { n: count(graphs.replays ?? 0) });
  return graphs.reason ? t("steps.off", { reason: graphs.reason }) : "";
}

function updateJob(card, find, slot, feed, act) {
  const job = slot.job;
  show(find("job"), Boolean(job));
  show(find("job-none"), !job);
  setText(find("job-none"), t("job.none"));
  if (!job) return;
  const percent = Math.round(jobShare(job) * 100);
  setText(find("node"), job.interrupted ? t("interrupting") : job.node ?? t("job.starts"));
  find("progress").firstChild.style.width = `${percent}%`;
  setAttribute(find("progress"), "aria-valuenow", percent);
  setAttribute(find("progress"), "aria-label", t("progress.of", { job: short(job.prompt_id) }));
  const step = job.max ? `${count(job.value)} / ${count(job.max)} · ` : "";
  setText(find("step"), step + t("nodes.of", { done: count(job.nodes_done), all: count(job.nodes) }));
  setAttribute(find("ran"), "data-since", job.started_at);
  setText(find("ran"), seconds(feed.since(job.started_at)));
  find("interrupt").dataset.id = job.prompt_id;
  const image = card.querySelector("img");
  const source = job.preview ? act.does.preview(slot.gpu_id, `${job.prompt_id}-${job.preview}`) : null;
  if (source && image.src !== source) image.src = source;
  setAttribute(image, "alt", t("preview.of", { job: short(job.prompt_id) }));
  show(image, Boolean(source));
  show(find("picture"), !source);
}

function updateMemory(find, slot) {
  const memory = slot.vram;
  const used = memory ? memory.total_bytes - memory.free_bytes : null;
  const percent = memory ? Math.round((used / memory.total_bytes) * 100) : 0;
  const name = [slot.device, slot.device_name].includes("cpu") ? t("memory.ram") : t("memory.gpu");
  setText(find("memory-name"), name);
  setText(find("memory-text"), memory ? t("memory.of", { used: bytes(used), total: bytes(memory.total_bytes) }) : t("unknown"));
  find("memory").firstChild.style.width = `${percent}%`;
  setAttribute(find("memory"), "aria-valuenow", percent);
  setAttribute(find("memory"), "aria-label", `${name}: ${slotName(slot.gpu_id)}`);
}

function updateModels(list, models) {
  const items = models === null ? [t("unknown")] : models.map((model) => `${model.name} ${bytes(model.loaded_bytes)}`);
  if (!items.length) items.push(t("models.none"));
  keyed(list, items.map((text, index) => ({ text, index })), (item) => item.index, () => el("li"), (row, item) => setText(row, item.text));
}
