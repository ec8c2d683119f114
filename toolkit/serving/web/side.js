// The adapters, and the state of the server.

import { PATHS, liveState, loadBody, parseMetrics, request } from "./api.js";

const POINTS = 60;

const element = (id) => document.getElementById(id);

/** Show the adapters, each with a button that unloads it. */
export function showAdapters(infos, unload) {
  const items = infos.map((info) => {
    const item = document.createElement("li");
    const about = document.createElement("div");
    const details = document.createElement("small");
    details.textContent = [info.description, size(info.bytes), info.version.slice(0, 8)].join(" · ");
    about.append(info.id, details);
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Unload" });
    button.setAttribute("aria-label", `Unload ${info.id}`);
    button.addEventListener("click", () => unload(info.id));
    item.append(about, button);
    return item;
  });
  element("adapters").replaceChildren(...items);
}

export function loadAdapter(name, path, key) {
  return request(PATHS.adapters, key, { method: "POST", body: loadBody(name, path) }).then((r) => r.json());
}

export function unloadAdapter(name, key) {
  return request(`${PATHS.adapters}/${encodeURIComponent(name)}`, key, { method: "DELETE" });
}

function size(bytes) {
  for (const unit of ["B", "kB", "MB"]) {
    if (bytes < 1000) return `${bytes.toFixed(unit === "B" ? 0 : 1)} ${unit}`;
    bytes /= 1000;
  }
  return `${bytes.toFixed(1)} GB`;
}

/** Reads the metrics and shows them. */
export class Live {
  constructor() {
    this.before = null;
    this.history = [];
  }

  async read(key) {
    const after = parseMetrics(await (await request(PATHS.metrics, key)).text());
    const now = performance.now();
    if (this.before) this.show(liveState(this.before.metrics, after, (now - this.before.at) / 1000));
    this.before = { metrics: after, at: now };
  }

  show(state) {
    const used = state.pages ? state.pagesUsed / state.pages : 0;
    const texts = {
      tokensPerSecond: state.tokensPerSecond.toFixed(1),
      firstToken: milliseconds(state.firstToken),
      perToken: milliseconds(state.perToken),
      running: state.running,
      waiting: state.waiting,
      pool: `${(100 * used).toFixed(0)}% of ${state.pages} pages`,
      resident: `${state.resident} of ${state.adapters}`,
    };
    for (const [name, text] of Object.entries(texts)) {
      document.querySelector(`[data-live="${name}"]`).textContent = text;
    }
    element("pool").value = used;
    this.draw(state.tokensPerSecond);
  }

  draw(rate) {
    this.history = [...this.history, rate].slice(-POINTS);
    const most = Math.max(...this.history, 1);
    const points = this.history.map((value, at) => `${(120 * at) / (POINTS - 1)},${31 - (30 * value) / most}`);
    document.querySelector("#history polyline").setAttribute("points", points.join(" "));
  }
}

function milliseconds(seconds) {
  return seconds === null ? "-" : `${(1000 * seconds).toFixed(1)} ms`;
}
