/**
 * The server's live state: one snapshot, then changes. Reconnects for as long as the page is open.
 *
 * A page that nobody sees gives its connection back: a browser has six for each server, whatever the number of its tabs.
 */

const RETRY_MS = 3000;
const NEEDS_A_PERSON = [401, 403]; // To ask again by itself would ask the person for a password every time.

export class Feed extends EventTarget {
  #url;
  #source = null;
  #timer = null;
  #offset = 0;

  constructor(url) {
    super();
    this.#url = url;
    this.parts = {};
    this.connection = "connecting"; // then "live" or "lost"
    this.lostAt = null;
    this.refusal = null; // the server's answer, when it is there and refuses: {status, reason}
  }

  start() {
    document.addEventListener("visibilitychange", this.#follow);
    this.#follow();
  }

  stop() {
    document.removeEventListener("visibilitychange", this.#follow);
    this.#disconnect();
  }

  #follow = () => {
    this.#disconnect();
    if (!document.hidden) this.#connect();
  };

  #connect() {
    this.#source = new EventSource(this.#url);
    this.#source.addEventListener("snapshot", (event) => this.#take(event, {}));
    this.#source.addEventListener("change", (event) => this.#take(event, this.parts));
    this.#source.addEventListener("error", () => this.#lose());
  }

  #disconnect() {
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
  }

  /** The server's clock now, in seconds. */
  clock() {
    return performance.now() / 1000 + this.#offset;
  }

  /** Seconds since a time of the server's clock. */
  since(at) {
    return Math.max(this.clock() - at, 0);
  }

  /** A time of the server's clock as Unix time, on this machine's clock. */
  date(at) {
    return Date.now() / 1000 - this.since(at);
  }

  /** The slots in order. */
  get slots() {
    const count = this.parts.server?.slots ?? 0;
    return Array.from({ length: count }, (_, index) => this.parts[`slot/${index}`]);
  }

  #take(event, before) {
    const { clock, parts } = JSON.parse(event.data);
    this.#offset = clock - performance.now() / 1000;
    this.parts = { ...before, ...parts };
    this.connection = "live";
    this.lostAt = null;
    this.refusal = null;
    this.dispatchEvent(new CustomEvent("parts", { detail: Object.keys(parts) }));
  }

  #lose() {
    // The browser tries again by itself, unless the server answered with an error.
    const isRefused = this.#source?.readyState === EventSource.CLOSED;
    this.#tellLost(isRefused ? this.refusal : null);
    if (isRefused) this.#askWhy(this.#source);
  }

  #tellLost(refusal) {
    this.connection = "lost";
    this.lostAt ??= new Date();
    this.refusal = refusal;
    this.dispatchEvent(new Event("lost"));
  }

  async #askWhy(source) {
    const refusal = await this.#refusal();
    if (source !== this.#source) return; // nobody sees the page any more, or it is connected again
    this.#tellLost(refusal);
    clearTimeout(this.#timer);
    if (!NEEDS_A_PERSON.includes(refusal?.status)) this.#timer = setTimeout(() => this.#connect(), RETRY_MS);
  }

  /** What the server answers instead of events; null when it does not answer, or does so now. */
  async #refusal() {
    const request = new AbortController();
    try {
      const reply = await fetch(this.#url, { signal: request.signal, credentials: "same-origin" });
      return reply.ok ? null : { status: reply.status, reason: await reasonOf(reply) };
    } catch {
      return null;
    } finally {
      request.abort();
    }
  }
}

/** Why a request was refused, in the server's words. */
export async function reasonOf(reply) {
  const text = await reply.text();
  try {
    const { message, details } = JSON.parse(text).error;
    return [message, details].filter(Boolean).join("; ");
  } catch {
    return `${reply.status} ${reply.statusText}`.trim();
  }
}
