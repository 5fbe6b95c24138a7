/** The workers of gpu_config.json, where the server has routes for them: launch, stop, and what they have logged. */

const LINES = 200;

export class Workers {
  #root;
  #parent;
  #parts;
  #tell;

  /** root: the address under which ComfyUI's routes are; tell(severity, text) shows a message. */
  constructor(root, parent, parts, tell) {
    this.#root = root;
    this.#parent = parent;
    this.#parts = parts;
    this.#tell = tell;
  }

  /** Show them; nothing where there are none, or no such routes. */
  async show() {
    const { el, t } = this.#parts;
    const config = await this.#get("distributed/config");
    const workers = Array.isArray(config?.workers) ? config.workers : [];
    if (!workers.length) return;
    this.#parent.replaceChildren(el("h3", { textContent: t("workers") }), ...workers.map((worker) => this.#row(worker)));
    this.#parent.hidden = false;
  }

  #row(worker) {
    const { el, t } = this.#parts;
    const name = String(worker.name ?? worker.id);
    const log = el("pre", { hidden: true, tabIndex: 0 });
    const button = (action, run) =>
      el("button", { type: "button", textContent: t(`worker.${action}`), "aria-label": `${t(`worker.${action}`)}: ${name}`, onclick: run });
    return el("article", {},
      el("div", { className: "row" }, el("span", { textContent: name }), el("span", { textContent: `${worker.host ?? ""}:${worker.port ?? ""}` })),
      el("div", { className: "tools" },
        button("launch", () => this.#post("distributed/launch_worker", worker.id, name)),
        button("stop", () => this.#post("distributed/stop_worker", worker.id, name)),
        button("log", () => this.#showLog(worker.id, log))),
      log);
  }

  async #showLog(id, log) {
    if (!log.hidden) {
      log.hidden = true;
      return;
    }
    const told = await this.#get(`distributed/worker_log/${encodeURIComponent(id)}?lines=${LINES}`);
    const text = told?.content ?? told?.log ?? told?.error ?? "";
    log.textContent = Array.isArray(text) ? text.join("\n") : String(text);
    log.hidden = false;
  }

  async #get(path) {
    try {
      const reply = await fetch(new URL(path, this.#root));
      return reply.ok || reply.status < 500 && reply.status !== 404 ? await reply.json() : null;
    } catch {
      return null; // no such route, or no JSON: the section stays away
    }
  }

  async #post(path, id, name) {
    const { t } = this.#parts;
    const reply = await fetch(new URL(path, this.#root), {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ worker_id: id }),
    });
    const told = await reply.json().catch(() => ({}));
    if (reply.ok) this.#tell("success", t("did.worker", { name }));
    else this.#tell("error", t("refused", { reason: told.message ?? told.error?.message ?? told.error ?? reply.statusText }));
  }
}
