/** The server's live state: one snapshot, then changes. Reconnects for as long as the page is open. */

const RETRY_MS = 3000;

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
  }

  start() {
    this.#source = new EventSource(this.#url);
    this.#source.addEventListener("snapshot", (event) => this.#take(event, {}));
    this.#source.addEventListener("change", (event) => this.#take(event, this.parts));
    this.#source.addEventListener("error", () => this.#lose());
  }

  stop() {
    clearTimeout(this.#timer);
    this.#source?.close();
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
    this.dispatchEvent(new CustomEvent("parts", { detail: Object.keys(parts) }));
  }

  #lose() {
    this.connection = "lost";
    this.lostAt ??= new Date();
    this.dispatchEvent(new Event("lost"));
    // The browser tries again by itself, unless the server answered with an error.
    if (this.#source.readyState !== EventSource.CLOSED) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.start(), RETRY_MS);
  }
}
