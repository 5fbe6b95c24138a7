/** The two dialogs: where and when a waiting job runs; which file to load ahead. */

import { el, setText, show } from "./dom.js";
import { short, slotName, t } from "./text.js";

// As in http/preload.py.
const FOLDERS = ["checkpoints", "clip_vision", "controlnet", "diffusion_models", "style_models", "text_encoders", "upscale_models", "vae"];

const byId = (id) => document.getElementById(id);
const option = (value, text) => el("option", { value, textContent: text });

/** Ask which slot and which priority; resolves to what is to change, or null. */
export async function askMove(job, slots) {
  const [slot, priority] = [byId("move-slot"), byId("move-priority")];
  setText(byId("move-title"), t("move.title", { job: short(job.prompt_id) }));
  slot.replaceChildren(option("auto", t("auto")), ...slots.map((one) => option(one.gpu_id, slotLine(one))));
  slot.value = job.gpu_id ?? "auto";
  priority.value = job.priority;
  const before = [slot.value, priority.value];
  if ((await answer(byId("move"))) !== "apply") return null;
  const wish = {};
  if (slot.value !== before[0]) wish.slot = slot.value === "auto" ? "auto" : Number(slot.value);
  if (priority.value !== before[1]) wish.priority = Number(priority.value);
  return Object.keys(wish).length ? wish : null;
}

/** Ask which file; resolves to its name and the slots, or null. */
export async function askPreload(id, slots, does) {
  const [folder, where] = [byId("preload-folder"), byId("preload-slot")];
  folder.replaceChildren(...FOLDERS.map((name) => option(name, name)));
  where.replaceChildren(option("all", t("preload.all")), ...slots.map((one) => option(one.gpu_id, slotLine(one))));
  where.value = id;
  const list = () => listFiles(folder.value, does);
  folder.onchange = list;
  const listed = list();
  const [said] = await Promise.all([answer(byId("preload")), listed]);
  if (said !== "apply") return null;
  const chosen = where.value === "all" ? slots.map((one) => one.gpu_id) : [Number(where.value)];
  return { file: `${folder.value}/${byId("preload-file").value}`, slots: chosen };
}

async function listFiles(folder, does) {
  const list = byId("preload-file");
  let files = [];
  try {
    files = await does.files(folder);
    setText(byId("preload-none"), t("preload.none"));
  } catch (error) {
    setText(byId("preload-none"), error.message);
  }
  if (byId("preload-folder").value !== folder) return; // another was chosen meanwhile
  list.replaceChildren(...files.map((name) => option(name, name)));
  list.disabled = !files.length;
  byId("preload").querySelector(".main").disabled = !files.length;
  show(byId("preload-none"), !files.length);
}

const slotLine = (slot) => [slotName(slot.gpu_id), slot.device].join(" · ");

function answer(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}
