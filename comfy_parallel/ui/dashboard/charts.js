/** Throughput and times over the last hour, drawn by uPlot (vendored: vendor/uPlot.LICENSE.txt). */

import uPlot from "./vendor/uPlot.esm.js";
import { setText } from "./dom.js";
import { count, currentLanguage, rate, seconds, t } from "./text.js";

const STRETCH_S = 20; // as in core/series.py
const SHORTEST_S = 300;
const HEIGHT = 190;

export class Charts {
  #plots = new Map();
  #resizes = new ResizeObserver((entries) => entries.forEach((entry) => this.#fit(entry.target)));

  /** Draw anew: the language or the colours have changed. */
  reset() {
    for (const plot of this.#plots.values()) plot.destroy();
    this.#plots.clear();
  }

  show(points, feed) {
    const rows = stretches(points, feed);
    const x = rows.map((row) => row.date);
    this.#draw("rate", [x, rates(rows)], [line("rate", "--main", true)]);
    const average = (name) => rows.map((row) => (row.jobs ? row[name] / row.jobs : null));
    this.#draw("times", [x, average("waited"), average("ran")], [line("waited", "--warn"), line("ran", "--good")]);
    const sum = (name) => rows.reduce((total, row) => total + row[name], 0);
    const jobs = sum("jobs");
    const minutes = rows.length * STRETCH_S / 60;
    setText(document.getElementById("rate-text"), t("chart.rate", { n: count(jobs), rate: rate(minutes ? jobs / minutes : 0) }));
    setText(document.getElementById("times-text"),
      jobs ? t("chart.times", { waited: seconds(sum("waited") / jobs), ran: seconds(sum("ran") / jobs) }) : t("chart.none"));
  }

  #draw(id, data, series) {
    const known = this.#plots.get(id);
    if (known) return known.setData(data);
    const parent = document.getElementById(id);
    this.#plots.set(id, new uPlot(options(parent, series), data, parent));
    this.#resizes.observe(parent);
  }

  #fit(parent) {
    this.#plots.get(parent.id)?.setSize({ width: parent.clientWidth, height: HEIGHT - 30 });
  }
}

/** Jobs per minute; a stretch that has not ended has the value before it, which so is drawn to its end. */
function rates(rows) {
  const whole = rows.map((row) => (row.isWhole ? (row.jobs * 60) / STRETCH_S : null));
  return whole.map((value, index) => value ?? whole[index - 1] ?? null);
}

/** The last stretches of time, also those without jobs; at least five minutes. */
function stretches(points, feed) {
  const known = new Map(points.map(([begin, jobs, waited, ran]) => [begin, { jobs, waited, ran }]));
  const now = feed.clock();
  const first = Math.min(points[0]?.[0] ?? Infinity, Math.floor((now - SHORTEST_S) / STRETCH_S) * STRETCH_S);
  const rows = [];
  for (let begin = first; begin <= now; begin += STRETCH_S) {
    const isWhole = begin + STRETCH_S <= now;
    rows.push({ date: Math.round(feed.date(begin)), isWhole, ...(known.get(begin) ?? { jobs: 0, waited: 0, ran: 0 }) });
  }
  return rows;
}

/** A colour of the style sheet as the canvas needs it. */
function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

const line = (name, stroke, isStepped = false) => ({
  label: t(`series.${name}`),
  stroke: colour(stroke),
  width: 2,
  spanGaps: true,
  paths: isStepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
  points: { show: !isStepped, size: 5 },
  value: (plot, value) => (value === null ? "–" : rate(value)),
});

function options(parent, series) {
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--track") }, ticks: { stroke: colour("--track") } };
  const time = (date) => date.toLocaleTimeString(currentLanguage(), { hour: "2-digit", minute: "2-digit" });
  return {
    width: parent.clientWidth,
    height: HEIGHT - 30,
    cursor: { drag: { x: false, y: false } },
    scales: { y: { range: (plot, low, high) => [0, Math.max(high ?? 0, 1) * 1.1] } },
    axes: [
      { ...axis, space: 70, values: (plot, ticks) => ticks.map((tick) => time(new Date(tick * 1000))) },
      { ...axis, size: 44 },
    ],
    series: [{ label: t("series.time"), value: (plot, at) => (at === null ? "–" : time(new Date(at * 1000))) }, ...series],
  };
}
