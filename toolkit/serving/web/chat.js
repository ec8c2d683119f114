// One conversation: a model or a composition, and the turns with it.

import { PATHS, answerBody, events, mixName, readEvent, request } from "./api.js";

const MIX = "composition …";

export class Chat {
  /** @param {() => string} key that requests carry. */
  constructor(key) {
    this.key = key;
    this.turns = [];
    this.weights = {};
    this.element = document.getElementById("chat").content.cloneNode(true).firstElementChild;
    this.select = this.element.querySelector(".model");
    this.mix = this.element.querySelector(".mix");
    this.log = this.element.querySelector(".log");
    this.select.addEventListener("change", () => this.showMix());
  }

  /** Offer models; the chosen one stays chosen while it is served. */
  offer(models, adapters) {
    const chosen = this.select.value;
    const names = adapters.length ? [...models, MIX] : models;
    this.select.replaceChildren(...names.map((name) => new Option(name, name)));
    this.select.value = names.includes(chosen) ? chosen : names[0];
    this.adapters = adapters;
    this.showMix();
  }

  showMix() {
    this.mix.hidden = this.select.value !== MIX;
    this.mix.querySelector(".sliders").replaceChildren(...this.adapters.map((name) => this.slider(name)));
    this.showName();
  }

  slider(name) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "range", min: -1, max: 2, step: 0.05 });
    const output = document.createElement("output");
    input.value = this.weights[name] ?? 0;
    output.textContent = Number(input.value).toFixed(2);
    input.addEventListener("input", () => {
      this.weights[name] = Number(input.value);
      output.textContent = this.weights[name].toFixed(2);
      this.showName();
    });
    label.append(name, input, output);
    return label;
  }

  showName() {
    this.mix.querySelector(".name").textContent = `model ${mixName(this.parts)}`;
  }

  get parts() {
    const names = this.adapters.filter((name) => this.weights[name]);
    return names.map((name) => ({ name, weight: this.weights[name] }));
  }

  get target() {
    return this.select.value === MIX ? { parts: this.parts } : { model: this.select.value };
  }

  clear() {
    this.turns = [];
    this.log.replaceChildren();
  }

  /** Ask, and show the answer as it comes. */
  async ask(text, settings, signal) {
    this.turns.push({ role: "user", content: text });
    this.show("turn user", text);
    const answer = this.show("turn assistant", "");
    const started = performance.now();
    const seen = { first: null, usage: null, routing: null, finished: null, model: "" };
    try {
      const body = answerBody(this.target, this.turns, settings);
      const response = await request(PATHS[settings.form], this.key(), { method: "POST", body, signal });
      for await (const event of events(response.body)) this.grow(answer, readEvent(event), seen);
    } catch (error) {
      this.fail(answer, error);
      if (error.name !== "AbortError") throw error;
      return;
    }
    this.turns.push({ role: "assistant", content: answer.textContent });
    this.explain(seen, started, performance.now());
  }

  grow(answer, part, seen) {
    if (part.text && seen.first === null) seen.first = performance.now();
    for (const name of ["usage", "routing", "finished", "model"]) seen[name] = part[name] ?? seen[name];
    answer.append(part.text);
    this.log.scrollTop = this.log.scrollHeight;
  }

  /** Take the turn back, so that the next prompt does not follow an unanswered one. */
  fail(answer, error) {
    this.turns.pop();
    const stopped = error.name === "AbortError";
    if (!answer.textContent) answer.remove();
    this.show(stopped ? "note" : "note bad", stopped ? "stopped" : error.message);
  }

  explain(seen, started, ended) {
    const tokens = seen.usage?.completion_tokens ?? 0;
    const facts = [`${seen.model}`, `${tokens} tokens`];
    if (seen.first !== null) facts.push(`first after ${Math.round(seen.first - started)} ms`);
    if (tokens > 1 && seen.first !== null && ended > seen.first) {
      facts.push(`${((1000 * (tokens - 1)) / (ended - seen.first)).toFixed(1)} tokens/s`);
    }
    if (seen.finished === "length") facts.push("cut at the most tokens");
    this.show("note", facts.join(" · "));
    if (seen.routing) this.log.append(why(seen.routing));
    this.log.scrollTop = this.log.scrollHeight;
  }

  show(kind, text) {
    const element = Object.assign(document.createElement("div"), { className: kind, textContent: text });
    this.log.append(element);
    this.log.scrollTop = this.log.scrollHeight;
    return element;
  }
}

/** Return what the router chose, and the scores that it chose by, the best first. */
function why({ expert, scores }) {
  const element = Object.assign(document.createElement("details"), { className: "why", open: true });
  const ranked = Object.entries(scores).sort((one, other) => other[1] - one[1]);
  const ahead = ranked.length > 1 ? `, ${(ranked[0][1] - ranked[1][1]).toFixed(3)} ahead of ${ranked[1][0]}` : "";
  const table = document.createElement("table");
  for (const [name, score] of ranked) {
    const row = table.insertRow();
    row.className = name === expert ? "chosen" : "";
    row.append(Object.assign(document.createElement("th"), { scope: "row", textContent: name }));
    row.insertCell().textContent = score.toFixed(3);
  }
  const summary = document.createElement("summary");
  summary.textContent = `the router chose ${expert}${ahead}`;
  element.append(summary, table);
  return element;
}
