// What the page asks of the server, and how it reads the answers. Nothing here touches the document.

// Relative, so that the page also works behind a proxy that puts it below another path.
export const PATHS = {
  ready: "ready",
  metrics: "metrics",
  models: "v1/models",
  adapters: "v1/adapters",
  chat: "v1/chat/completions",
  text: "v1/completions",
};

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Send a request; return its response, or throw what the server says is wrong. */
export async function request(path, key, { method = "GET", body, signal } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  const text = await response.text();
  throw new ApiError(response.status, messageOf(text) || `the server answered ${response.status}`);
}

function messageOf(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text.slice(0, 300);
  }
}

/** Return the body of a request for an answer. `target` is `{model}` or `{parts: [{name, weight}]}`. */
export function answerBody(target, turns, settings) {
  const body = {
    model: target.parts ? "base" : target.model,
    temperature: settings.temperature,
    max_tokens: settings.maxTokens,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (target.parts?.length) body.adapters = target.parts;
  if (settings.seed !== null) body.seed = settings.seed;
  if (settings.form === "text") return { ...body, prompt: turns.at(-1).content };
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  return { ...body, messages: [...system, ...turns] };
}

/** Return the body of a request to load an adapter; without a path it is read anew from where it came. */
export function loadBody(name, path) {
  return path ? { name, path } : { name };
}

/** Return the name of a composition, as the server writes it. */
export function mixName(parts) {
  return parts.length ? parts.map(({ name, weight }) => `${name}:${weight}`).join("+") : "base";
}

/** Yield the objects of a stream of server-sent events. */
export async function* events(stream) {
  const decoder = new TextDecoder();
  let held = "";
  for await (const bytes of chunks(stream)) {
    held += decoder.decode(bytes, { stream: true });
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// Not every browser can iterate over a stream.
async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } finally {
    await reader.cancel();
  }
}

/** Return what one event adds: `{text, finished, usage, routing, model}`. */
export function readEvent(event) {
  if (event.error) throw new ApiError(500, event.error.message);
  const choice = event.choices[0];
  return {
    text: choice?.delta?.content ?? choice?.text ?? "",
    finished: choice?.finish_reason ?? null,
    usage: event.usage ?? null,
    routing: event.routing ?? null,
    model: event.model,
  };
}

/** Read Prometheus' text format; return the sum over labels of each series. */
export function parseMetrics(text) {
  const sums = {};
  for (const line of text.split("\n")) {
    const found = /^(\w+)(?:\{.*\})? (\S+)$/.exec(line);
    if (found) sums[found[1]] = (sums[found[1]] ?? 0) + Number(found[2]);
  }
  return sums;
}

/** Return the state of the server between two readings of its metrics that are `seconds` apart. */
export function liveState(before, after, seconds) {
  const grown = (name) => (after[name] ?? 0) - (before[name] ?? 0);
  const mean = (name) => (grown(`${name}_count`) ? grown(`${name}_sum`) / grown(`${name}_count`) : null);
  return {
    tokensPerSecond: grown("toolkit_generated_tokens_total") / seconds,
    firstToken: mean("toolkit_time_to_first_token_seconds"),
    perToken: mean("toolkit_time_per_output_token_seconds"),
    running: after.toolkit_requests_running,
    waiting: after.toolkit_requests_waiting,
    pages: after.toolkit_pages,
    pagesUsed: after.toolkit_pages - after.toolkit_pages_free,
    adapters: after.toolkit_adapters,
    resident: after.toolkit_adapters_resident,
  };
}
