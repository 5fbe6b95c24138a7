/** The jobs that wait, those that ended last, and the weight files in use. */

import { el, keyed, setAttribute, setText, show } from "./dom.js";
import { bytes, count, seconds, short, slotName, slotOrAuto, t } from "./text.js";

const byId = (id) => document.getElementById(id);

export function showWaiting(waiting, feed, act) {
  show(byId("waiting-empty"), waiting.total === 0);
  show(byId("waiting-table"), waiting.total > 0);
  show(byId("waiting-more"), waiting.total > waiting.jobs.length);
  setText(byId("waiting-more"), t("waiting.more", { n: count(waiting.total - waiting.jobs.length) }));
  const make = () => el("tr", {},
    el("td", {}, el("code")), el("td"), el("td"), el("td", {}, el("time")), el("td"),
    el("td", {}, el("div", { className: "tools" },
      el("button", { type: "button", className: "move" }),
      el("button", { type: "button", className: "cancel" }))));
  keyed(byId("waiting"), waiting.jobs, (job) => job.prompt_id, make, (row, job) => updateWaiting(row, job, feed, act));
}

function updateWaiting(row, job, feed, act) {
  const [id, where, priority, waited, nodes] = row.children;
  setText(id.firstChild, short(job.prompt_id));
  setAttribute(id.firstChild, "title", job.prompt_id);
  setText(where, slotOrAuto(job.gpu_id) + (job.alone ? ` · ${t("alone")}` : ""));
  setText(priority, job.priority);
  setAttribute(waited.firstChild, "data-since", job.queued_at);
  setText(waited.firstChild, job.queued_at ? seconds(feed.since(job.queued_at)) : "–");
  setText(nodes, job.nodes ?? "–");
  for (const [name, run] of [
    ["move", () => act.move(job)],
    ["cancel", () => act((does) => does.cancel(job.prompt_id), "did.cancel")],
  ]) {
    const button = row.querySelector(`.${name}`);
    setText(button, t(`job.${name}`));
    setAttribute(button, "aria-label", `${t(`job.${name}`)}: ${short(job.prompt_id)}`);
    button.onclick = run;
  }
}

export function showRecent(recent, feed, act) {
  show(byId("recent-empty"), recent.length === 0);
  const make = () => el("li", {},
    el("div", { className: "thumb" }),
    el("div", {},
      el("p", {}, el("strong"), " ", el("code")),
      el("p", { className: "note" }), el("p", { className: "note" }, el("time")), el("p", { className: "error", hidden: true })));
  keyed(byId("recent"), recent, (job) => `${job.prompt_id}/${job.ended_at}`, make, (row, job) => updateRecent(row, job, feed, act));
}

function updateRecent(row, job, feed, act) {
  const [outcome, code] = [row.querySelector("strong"), row.querySelector("code")];
  outcome.className = job.outcome;
  setText(outcome, t(`outcome.${job.outcome}`));
  setText(code, short(job.prompt_id));
  setAttribute(code, "title", job.prompt_id);
  const [times, ended] = row.querySelectorAll(".note");
  setText(times, t("times", { slot: slotName(job.gpu_id), waited: seconds(job.waited_s), ran: seconds(job.ran_s) }));
  setAttribute(ended.firstChild, "data-ago", job.ended_at);
  setText(ended.firstChild, t("ago", { time: seconds(feed.since(job.ended_at)) }));
  setText(row.querySelector(".error"), job.error ?? "");
  show(row.querySelector(".error"), Boolean(job.error));
  updateThumbnail(row.firstChild, job, act);
}

function updateThumbnail(parent, job, act) {
  const source = job.image ? act.does.picture(job.image, true) : "";
  if (parent.dataset.source === source) return;
  parent.dataset.source = source;
  const nothing = () => el("div", { className: "picture", "aria-hidden": "true" });
  if (!source) return parent.replaceChildren(nothing());
  const image = el("img", { src: source, loading: "lazy", alt: t("result.of", { job: short(job.prompt_id) }) });
  image.addEventListener("error", () => parent.replaceChildren(nothing())); // the file is no longer there
  parent.replaceChildren(el("a", { href: act.does.picture(job.image, false), target: "_blank", rel: "noopener" }, image));
}

export function showWeights(weights) {
  const files = [...weights.files].sort((one, other) => other.size_bytes - one.size_bytes);
  show(byId("weights-table"), files.length > 0);
  show(byId("weights-empty"), files.length === 0);
  setText(byId("weights-empty"), t(weights.mode === "off" ? "weights.off" : "weights.none"));
  const make = () => el("tr", {}, el("td", {}, el("code")), el("td"), el("td"), el("td"));
  keyed(byId("weights"), files, (file) => file.name, make, (row, file) => {
    const [name, size, ram, slots] = row.children;
    setText(name.firstChild, file.name);
    setText(size, bytes(file.size_bytes));
    setText(ram, t("weights.held", { mapped: bytes(file.mapped_bytes), copied: bytes(file.copied_bytes + file.converted_bytes) }));
    setText(slots, file.slots.length ? file.slots.map(slotName).join(", ") : "–");
  });
}
