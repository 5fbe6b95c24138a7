/** In ComfyUI's own page: a tab with the slots, and a choice of the slot that the Run button's jobs go to. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const ROOT = new URL("../../", import.meta.url);
const MODULE = `custom_nodes.${decodeURIComponent(import.meta.url.split("/").at(-2))}`; // of our nodes, for the host
const CHOICE = "comfy_parallel.run_on"; // of this tab of the browser only
const CHOICE_MS = 3000; // The feed tells what was chosen within this time.
const HEADER = "X-TARGET-GPU";
const STYLE = `
  :host { display: block; height: 100%; overflow-y: auto; color: var(--fg-color, #222); font-size: 14px; }
  div.all { padding: 12px; display: grid; gap: 12px; }
  h2 { font-size: 15px; margin: 0; } h3 { font-size: 14px; margin: 0; }
  label { display: grid; gap: 4px; }
  select, button { font: inherit; color: var(--input-text, inherit); background: var(--comfy-input-bg, transparent); border: 1px solid var(--border-color, #888); border-radius: 6px; padding: 5px 8px; min-height: 32px; }
  button { cursor: pointer; } button:disabled { cursor: not-allowed; opacity: .6; }
  :focus-visible { outline: 2px solid var(--p-primary-color, #3b82f6); outline-offset: 1px; }
  a { color: inherit; }
  p { margin: 0; } [hidden] { display: none !important; }
  article { border: 1px solid var(--border-color, #888); border-radius: 8px; padding: 10px; display: grid; gap: 7px; }
  label.part { display: flex; align-items: center; }
  pre { margin: 0; max-height: 240px; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }
  .row { display: flex; justify-content: space-between; gap: 8px; align-items: baseline; }
  .row > * { min-width: 0; overflow-wrap: anywhere; }
  .bar { height: 6px; border-radius: 3px; background: var(--border-color, #888); overflow: hidden; }
  .bar > span { display: block; height: 100%; width: 0; background: var(--p-primary-color, #3b82f6); }
  .tools { display: flex; flex-wrap: wrap; gap: 6px; }
  img { width: 100%; max-height: 160px; object-fit: contain; border-radius: 6px; }
`;

/** The server's slots; null when it has none: comfy_parallel is off, or gave way to another queue. */
async function knownSlots() {
  const reply = await fetch(new URL("health", ROOT));
  const slots = reply.ok ? (await reply.json()).slots : null;
  return Array.isArray(slots) && (await fetch(new URL("parallel/ui/text.js", ROOT), { method: "HEAD" })).ok ? slots : null;
}

const load = (name) => import(new URL(`parallel/ui/${name}`, ROOT).href);

/** Which slot the Run button's jobs go to: "auto" or a slot's number, as text. */
class Choice extends EventTarget {
  constructor(count) {
    super();
    this.values = ["auto", ...Array.from({ length: count }, (_, index) => String(index))];
    const before = read();
    this.value = this.values.includes(before) ? before : "auto";
  }

  set(value) {
    this.value = value;
    try { sessionStorage.setItem(CHOICE, value); } catch { /* forbidden: it is kept until the page is loaded again */ }
    this.dispatchEvent(new Event("change"));
  }
}

function read() {
  try { return sessionStorage.getItem(CHOICE); } catch { return null; }
}

/** Let requests of the page say where a job is to run, and whose jobs are to be interrupted. */
function follow(choice) {
  const original = api.fetchApi;
  api.fetchApi = function (route, options) {
    const isPost = options?.method?.toUpperCase() === "POST";
    if (isPost && route === "/prompt") options = withHeader(options, choice.value);
    if (isPost && route === "/interrupt") options = withClient(options);
    return original.call(this, route, options);
  };
}

function withHeader(options, value) {
  return { ...options, headers: { ...Object.fromEntries(new Headers(options.headers ?? {})), [HEADER]: value } };
}

/** Without a job's id only the jobs of this page are meant. */
function withClient(options) {
  const body = options.body ? JSON.parse(options.body) : {};
  return body.prompt_id ? options : { ...options, body: JSON.stringify({ ...body, client_id: api.clientId }) };
}

/** Our nodes' descriptions and tooltips in the page's language; those of ComfyUI and of other packs are their own. */
async function translateNodes(defs) {
  const language = String(app.extensionManager.setting.get("Comfy.Locale") ?? "en").slice(0, 2);
  if (language !== "zh") return;
  const reply = await fetch(new URL("parallel/ui/nodes.zh.json", ROOT));
  if (!reply.ok) return; // English then
  const words = Object.entries(await reply.json());
  const said = (text) => words.reduce((told, [english, ours]) => told.replaceAll(english, ours), text);
  for (const def of Object.values(defs).filter((one) => one.python_module === MODULE)) {
    def.description = said(def.description ?? "");
    for (const [, options] of Object.values({ ...def.input?.required, ...def.input?.optional })) {
      if (options?.tooltip) options.tooltip = said(options.tooltip);
    }
  }
}

class Tab {
  #parts;
  #feed = null;
  #timer = null;

  constructor(choice, names, parts) {
    this.choice = choice;
    this.chosen = [];
    this.chosenUntil = 0;
    this.names = names;
    this.#parts = parts;
  }

  render(parent) {
    const { el, t, Feed, Actions, Workers } = this.#parts;
    this.destroy();
    this.select = el("select", { onchange: (event) => this.choice.set(event.target.value) });
    this.note = el("p", { role: "status" });
    this.list = el("div", { className: "all", style: "padding: 0" });
    const workers = el("section", { hidden: true });
    const host = el("div", { style: "height: 100%" });
    host.attachShadow({ mode: "open" }).append(
      el("style", { textContent: STYLE }),
      el("div", { className: "all" },
        el("h2", { textContent: "comfy_parallel" }),
        el("label", {}, el("span", { textContent: t("run_on") }), this.select),
        this.note, this.list, workers,
        el("a", { href: new URL("parallel/", ROOT).href, target: "_blank", rel: "noopener", textContent: t("dashboard.open") })));
    parent.replaceChildren(host);
    this.#showChoice();
    this.choice.addEventListener("change", this.#showChoice);
    this.does = new Actions(ROOT);
    this.#feed = new Feed(new URL("parallel/events", ROOT));
    this.#feed.addEventListener("parts", () => this.#show());
    this.#feed.addEventListener("lost", () => this.#show());
    this.#feed.start();
    new Workers(ROOT, workers, this.#parts, tell).show();
    this.#timer = setInterval(() => this.#show(), 1000);
    this.#show();
  }

  destroy() {
    clearInterval(this.#timer);
    this.#feed?.stop();
    this.#feed = null;
    this.choice.removeEventListener("change", this.#showChoice);
  }

  #showChoice = () => {
    const { el } = this.#parts;
    this.select.replaceChildren(...this.choice.values.map((value) => el("option", { value, textContent: this.names(value) })));
    this.select.value = this.choice.value;
  };

  #show() {
    const { keyed, setText, show, t } = this.#parts;
    const { connection, parts, slots } = this.#feed;
    const told = connection === "live" ? t("totals", parts.server) : t(`connection.${connection}`);
    setText(this.note, told);
    keyed(this.list, slots, (slot) => slot.gpu_id, (slot) => this.#card(slot.gpu_id), (card, slot) => this.#update(card, slot));
    for (const button of this.list.querySelectorAll("button")) button.disabled = connection !== "live";
    show(this.list, slots.length > 0);
  }

  #card(id) {
    const { el } = this.#parts;
    const button = (name, run) => el("button", { type: "button", className: name, onclick: run });
    return el("article", { "aria-labelledby": `comfy-parallel-${id}` },
      el("div", { className: "row" }, el("h3", { id: `comfy-parallel-${id}` }), el("span", { className: "state" })),
      el("div", { className: "job" },
        el("div", { className: "share" }),
        el("div", { className: "row" }, el("span", { className: "node" }), el("span", { className: "step" })),
        el("div", { className: "bar", role: "progressbar" }, el("span"))),
      el("img", { alt: "", hidden: true }),
      el("div", { className: "row" }, el("span", { className: "pending" })),
      el("label", { className: "part" }, el("input", { type: "checkbox", className: "takes-part", onchange: () => this.#takePart(id) }), el("span")),
      el("div", { className: "tools" },
        button("interrupt", (event) => this.#ask(() => this.does.interrupt(event.currentTarget.dataset.id), "did.interrupt")),
        button("pause", () => this.#ask(() => this.does.pause([id]), "did.pause")),
        button("resume", () => this.#ask(() => this.does.resume([id]), "did.resume")),
        button("free", () => this.#ask(() => this.does.free(id), "did.free"))));
  }

  #update(card, slot) {
    const { count, jobShare, seconds, setAttribute, setText, show, t } = this.#parts;
    const find = (name) => card.querySelector(`.${name}`);
    const name = this.names(String(slot.gpu_id));
    const { job } = slot;
    setAttribute(card, "data-state", slot.state);
    setText(card.querySelector("h3"), name);
    setText(find("state"), t(`state.${slot.state}`));
    setText(find("pending"), t("pending", { n: count(slot.pending) }));
    const isClosed = ["paused", "draining", "suspended", "failed"].includes(slot.state);
    for (const [action, isShown] of [["interrupt", Boolean(job)], ["pause", !isClosed], ["resume", isClosed], ["free", true]]) {
      setText(find(action), t(action));
      setAttribute(find(action), "aria-label", `${t(action)}: ${name}`);
      show(find(action), isShown);
    }
    const takesPart = find("takes-part");
    if (takesPart.checked !== this.#takesPart(slot)) takesPart.checked = this.#takesPart(slot);
    setText(takesPart.nextElementSibling, t("takes_part"));
    setAttribute(takesPart, "aria-label", `${t("takes_part")}: ${name}`);
    setText(find("share"), job?.share ? t("share", { n: job.share.participant + 1, all: job.share.participants }) : "");
    show(find("share"), Boolean(job?.share));
    show(find("job"), Boolean(job));
    const image = card.querySelector("img");
    show(image, Boolean(job?.preview));
    if (!job) return;
    find("interrupt").dataset.id = job.prompt_id;
    const percent = Math.round(jobShare(job) * 100);
    setText(find("node"), job.interrupted ? t("interrupting") : job.node ?? t("job.starts"));
    setText(find("step"), seconds(this.#feed.since(job.started_at)));
    setAttribute(find("bar"), "aria-valuenow", percent);
    setAttribute(find("bar"), "aria-label", name);
    find("bar").firstChild.style.width = `${percent}%`;
    const source = this.does.preview(slot.gpu_id, `${job.prompt_id}-${job.preview}`);
    if (job.preview && image.src !== source) image.src = source;
  }

  /** As chosen here a moment ago, which the feed may not tell yet; else as the server tells. */
  #takesPart(slot) {
    return performance.now() < this.chosenUntil ? this.chosen.includes(slot.gpu_id) : slot.takes_part;
  }

  /** Who takes part is one list for all; the last one stays in it. */
  #takePart(id) {
    const others = this.#feed.slots.filter((slot) => (slot.gpu_id === id) !== this.#takesPart(slot)).map((slot) => slot.gpu_id);
    this.chosen = others.length ? others : [id];
    this.chosenUntil = performance.now() + CHOICE_MS;
    const slots = this.chosen.map((one) => this.names(String(one))).join(", ");
    this.#ask(() => this.does.takePart(this.chosen), "did.takes_part", { slots });
    this.#show();
  }

  async #ask(run, done, words = {}) {
    const { t } = this.#parts;
    try {
      await run();
      tell("success", t(done, words));
    } catch (error) {
      tell("error", t("refused", { reason: error.message }));
    }
  }
}

function tell(severity, detail) {
  app.extensionManager.toast.add({ severity, summary: "comfy_parallel", detail, life: 5000 });
}

async function start(slots) {
  const files = ["actions.js", "dom.js", "feed.js", "text.js", "job.js", "workers.js"];
  const [actions, dom, feed, text, job, workers] = await Promise.all(files.map(load));
  const parts = { ...actions, ...dom, ...feed, ...text, ...job, ...workers };
  const { t } = text;
  const choice = new Choice(slots.length);
  // Where each slot has a GPU of its own, that is what people call it.
  const isOneEach = new Set(slots.map((slot) => slot.device)).size === slots.length && slots[0].device !== "cpu";
  const names = (value) => {
    if (value === "auto") return t("auto");
    return `${t(isOneEach ? "gpu" : "slot", { n: value })} · ${slots[Number(value)].device}`;
  };
  follow(choice);
  const choose = (value) => {
    choice.set(value);
    tell("info", t("run_on.now", { slot: names(value) }));
  };
  await text.loadWords("en"); // for the names of commands, which are registered before the settings are there
  app.registerExtension({
    name: "comfy_parallel",
    commands: choice.values.map((value) => ({
      id: `comfy_parallel.run_on.${value}`,
      label: `comfy_parallel: ${t("run_on")} ${names(value)}`,
      function: () => choose(value),
    })),
    addCustomNodeDefs: translateNodes,
    async setup() {
      await text.loadWords(String(app.extensionManager.setting.get("Comfy.Locale") ?? "en").slice(0, 2));
      const tab = new Tab(choice, names, parts);
      app.extensionManager.registerSidebarTab({
        id: "comfy_parallel",
        icon: "pi pi-server",
        title: t("slots"),
        tooltip: t("slots"),
        type: "custom",
        render: (parent) => tab.render(parent),
        destroy: () => tab.destroy(),
      });
    },
  });
}

const slots = await knownSlots();
if (slots?.length) await start(slots);
