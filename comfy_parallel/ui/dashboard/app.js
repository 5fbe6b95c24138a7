/** The dashboard: what the feed tells is shown, what people press is asked for. */

import { Actions } from "./actions.js";
import { Charts } from "./charts.js";
import { askMove, askPreload } from "./dialogs.js";
import { el, setText, show } from "./dom.js";
import { Feed } from "./feed.js";
import { showRecent, showWaiting, showWeights } from "./jobs.js";
import { showSlots } from "./slots.js";
import { count, currentLanguage, LANGUAGES, loadWords, seconds, t, translate } from "./text.js";

const TOAST_MS = 6000;
const byId = (id) => document.getElementById(id);
const here = new URL(document.baseURI);
here.username = here.password = ""; // Who opened http://NAME:PASSWORD@HOST/ may not ask for such addresses from a script.
const feed = new Feed(new URL("events", here));
const does = new Actions(new URL("../", here));
const charts = new Charts();

/** Ask the server for something, and say how that went. */
async function act(ask, done) {
  try {
    await ask(does);
    say(t(done));
  } catch (error) {
    say(t("refused", { reason: error.message }), true);
  }
}
act.does = does;
act.move = async (job) => {
  const wish = await askMove(job, feed.slots);
  if (wish) act(() => does.change(job.prompt_id, wish), "did.move");
};
act.preload = async (id) => {
  const wish = await askPreload(id, feed.slots, does);
  if (wish) act(() => does.preload(wish.file, wish.slots), "did.preload");
};

function say(text, isBad = false) {
  const toast = el("p", { textContent: text, className: isBad ? "bad" : "" });
  byId("toasts").append(toast);
  setTimeout(() => toast.remove(), TOAST_MS);
}

function showAll(names) {
  const { parts } = feed;
  const has = (prefix) => names.some((name) => name.startsWith(prefix));
  if (has("slot/") || has("server")) showSlots(byId("slots"), feed.slots, feed, act);
  if (has("waiting")) showWaiting(parts.waiting, feed, act);
  if (has("recent")) showRecent(parts.recent, feed, act);
  if (has("charts")) charts.show(parts.charts, feed);
  if (has("weights")) showWeights(parts.weights);
  show(byId("loading"), false);
  showConnection();
}

function showConnection() {
  const { server } = feed.parts;
  document.body.dataset.connection = feed.connection;
  setText(byId("connection-text"), t(`connection.${feed.connection}`));
  setText(byId("totals"), server ? t("totals", { running: count(server.running), waiting: count(server.waiting) }) + (server.refuses_jobs ? ` · ${t("refuses")}` : "") : "");
  document.title = server ? `${server.running}/${server.slots} · comfy_parallel` : "comfy_parallel";
  show(byId("banner"), feed.connection === "lost");
  if (feed.connection === "lost") setText(byId("banner"), whyLost());
  for (const button of document.querySelectorAll("header button, main button")) button.disabled = feed.connection !== "live";
}

function whyLost() {
  const time = feed.lostAt.toLocaleTimeString(currentLanguage());
  if (!feed.refusal) return t("lost", { time });
  return t([401, 403].includes(feed.refusal.status) ? "lost.login" : "lost.refused", { time, ...feed.refusal });
}

/** What grows with time: how long jobs run, wait, have ended. */
function tick() {
  if (feed.connection !== "live") return;
  for (const time of document.querySelectorAll("[data-since]")) setText(time, seconds(feed.since(Number(time.dataset.since))));
  for (const time of document.querySelectorAll("[data-ago]")) setText(time, t("ago", { time: seconds(feed.since(Number(time.dataset.ago))) }));
}

async function speak(language) {
  await loadWords(language);
  document.documentElement.lang = currentLanguage() === "zh" ? "zh-CN" : "en";
  byId("language").value = currentLanguage();
  translate(document);
  redraw();
}

function redraw() {
  charts.reset();
  if (feed.parts.server) showAll(Object.keys(feed.parts));
  showConnection();
}

function setTheme(theme) {
  byId("theme").value = theme;
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  redraw();
}

/** Storage may be forbidden; the page then forgets what was chosen. */
const remembered = (name) => { try { return localStorage.getItem(`comfy_parallel.${name}`); } catch { return null; } };
const remember = (name, value) => { try { localStorage.setItem(`comfy_parallel.${name}`, value); } catch { /* forbidden */ } };

function listen() {
  const slots = () => feed.slots.map((slot) => slot.gpu_id);
  byId("pause-all").onclick = () => act(() => does.pause(slots()), "did.pause");
  byId("resume-all").onclick = () => act(() => does.resume(slots()), "did.resume");
  byId("drain-all").onclick = () => act(() => does.drain(slots()), "did.drain");
  byId("language").onchange = (event) => { remember("language", event.target.value); speak(event.target.value); };
  byId("theme").onchange = (event) => { remember("theme", event.target.value); setTheme(event.target.value); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  feed.addEventListener("parts", (event) => showAll(event.detail));
  feed.addEventListener("lost", showConnection);
  setInterval(tick, 1000);
  setInterval(() => feed.connection === "live" && charts.show(feed.parts.charts, feed), 20000);
}

const preferred = navigator.languages?.map((tag) => tag.slice(0, 2)).find((tag) => LANGUAGES.includes(tag));
await speak(remembered("language") ?? preferred ?? "en");
setTheme(remembered("theme") ?? "auto");
listen();
feed.start();
