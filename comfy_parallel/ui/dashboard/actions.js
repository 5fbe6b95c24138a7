/** What the page asks the server to do, by routes that everybody may use. */

import { reasonOf } from "./feed.js";

export class Actions {
  /** root: the address under which ComfyUI's routes are. */
  constructor(root) {
    this.root = root;
  }

  pause = (slots) => this.#post("parallel/pause", { gpu_ids: slots });
  resume = (slots) => this.#post("parallel/resume", { gpu_ids: slots });
  drain = (slots) => this.#post("parallel/drain", { gpu_ids: slots });
  interrupt = (id) => this.#post("interrupt", { prompt_id: id });
  cancel = (id) => this.#post("queue", { delete: [id] });
  change = (id, wish) => this.#post(`parallel/jobs/${encodeURIComponent(id)}`, wish);
  preload = (file, slots) => this.#post("parallel/preload", { files: [file], gpu_ids: slots });
  takePart = (slots) => this.#post("parallel/participants", { gpu_ids: slots });
  free = (slot) => this.#post("free", { unload_models: true, free_memory: true }, { "X-TARGET-GPU": String(slot) });

  /** The files in one of ComfyUI's model folders. */
  async files(folder) {
    const reply = await fetch(new URL(`models/${folder}`, this.root));
    if (reply.status === 404) return []; // this ComfyUI has no such folder
    if (!reply.ok) throw new Error(await reasonOf(reply));
    return reply.json();
  }

  /** Where a picture that a job made is shown; small, when a preview is enough. */
  picture(image, isSmall) {
    const query = new URLSearchParams(image);
    if (isSmall) query.set("preview", "webp;70");
    return new URL(`view?${query}`, this.root).href;
  }

  preview(slot, number) {
    return new URL(`parallel/preview/${slot}?n=${number}`, this.root).href;
  }

  async #post(path, body, headers = {}) {
    const reply = await fetch(new URL(path, this.root), {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers },
      body: JSON.stringify(body),
    });
    if (!reply.ok) throw new Error(await reasonOf(reply));
  }
}
