/** The page's words in two languages, and how numbers are written. */

export const LANGUAGES = ["en", "zh"];
let words = {};
let language = "en";

export const currentLanguage = () => language;

export async function loadWords(wanted) {
  language = LANGUAGES.includes(wanted) ? wanted : "en";
  const reply = await fetch(new URL(`locales/${language}.json`, import.meta.url));
  if (!reply.ok) throw new Error(`locales/${language}.json: ${reply.status}`);
  words = await reply.json();
}

/** The sentence of that name, with what it has blanks for. */
export function t(name, blanks = {}) {
  const sentence = words[name] ?? name;
  return sentence.replace(/\{(\w+)\}/g, (blank, key) => blanks[key] ?? blank);
}

/** Write the words into a part of the page that names them by data-t. */
export function translate(root) {
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of root.querySelectorAll("[data-t-label]")) element.setAttribute("aria-label", t(element.dataset.tLabel));
}

const number = (value, digits) =>
  value.toLocaleString(language, { minimumFractionDigits: digits, maximumFractionDigits: digits });

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 10) return t("unit.seconds", { n: number(Math.max(value, 0), 1) });
  if (value < 120) return t("unit.seconds", { n: number(value, 0) });
  const minutes = Math.floor(value / 60);
  if (minutes < 120) return t("unit.minutes", { m: minutes, s: Math.floor(value % 60) });
  return t("unit.hours", { h: Math.floor(minutes / 60), m: minutes % 60 });
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const gib = value / 2 ** 30;
  if (gib >= 1) return `${number(gib, 1)}\u00a0GiB`;
  return value >= 2 ** 20 ? `${number(value / 2 ** 20, 0)}\u00a0MiB` : `${number(value / 2 ** 10, 0)}\u00a0KiB`;
}

export const count = (value) => number(value, 0);
export const rate = (value) => number(value, 1);
export const short = (id) => (String(id).length > 12 ? `${String(id).slice(0, 8)}…` : String(id));

export const slotName = (id) => t("slot", { n: id });
export const slotOrAuto = (id) => (id === null || id === undefined ? t("auto") : slotName(id));
