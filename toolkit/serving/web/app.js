// The page: conversations on the left, the server's state on the right.

import { PATHS, request } from "./api.js";
import { Chat } from "./chat.js";
import { Live, loadAdapter, showAdapters, unloadAdapter } from "./side.js";

const EVERY = 2000;
const KEY = "toolkit-api-key";

const element = (id) => document.getElementById(id);
const key = () => sessionStorage.getItem(KEY) ?? "";
const chats = [new Chat(key)];
const live = new Live();
let running = null;

/** Run something that asks the server; a refusal for want of a key asks for one, all else is told. */
async function guarded(action, tell) {
  try {
    await action();
  } catch (error) {
    if (error.status === 401) askForKey();
    tell?.(error.message);
  }
}

function askForKey() {
  if (!element("key-dialog").open) element("key-dialog").showModal();
}

function showState(text, bad = false) {
  element("state").textContent = text;
  element("state").classList.toggle("bad", bad);
}

function tell(text, bad = true) {
  element("told").textContent = text;
  element("told").classList.toggle("bad", bad);
}

async function refresh() {
  const [models, adapters] = await Promise.all(
    [PATHS.models, PATHS.adapters].map(async (path) => (await (await request(path, key())).json()).data),
  );
  showAdapters(adapters, (name) => guarded(() => unload(name), tell));
  for (const chat of chats) chat.offer(models.map((model) => model.id), adapters.map((adapter) => adapter.id));
}

async function watch() {
  if (document.visibilityState !== "visible" || element("key-dialog").open) return;
  try {
    await live.read(key());
    await request(PATHS.ready);
    showState("ready");
  } catch (error) {
    showState(error.status ? error.message : "the server cannot be reached", true);
    if (error.status === 401) askForKey();
  }
}

async function unload(name) {
  if (!confirm(`Unload ${name}? Answers under way are finished with it.`)) return;
  await unloadAdapter(name, key());
  await refresh();
  tell(`${name} is unloaded`, false);
}

async function load(event) {
  event.preventDefault();
  const found = await loadAdapter(element("load-name").value, element("load-path").value, key());
  element("load").reset();
  await refresh();
  tell(`${found.id} is ${found.status}`, false);
}

function settings() {
  const seed = element("seed").value;
  return {
    form: element("form").value,
    temperature: Number(element("temperature").value),
    maxTokens: Number(element("max-tokens").value),
    seed: seed === "" ? null : Number(seed),
    system: element("system").value,
  };
}

async function send(event) {
  event.preventDefault();
  const text = element("prompt").value;
  if (running || !text.trim()) return;
  running = new AbortController();
  setBusy(true);
  element("prompt").value = "";
  const { signal } = running;
  await Promise.all(chats.map((chat) => guarded(() => chat.ask(text, settings(), signal))));
  running = null;
  setBusy(false);
  element("prompt").focus();
}

function setBusy(busy) {
  element("send").disabled = busy;
  element("stop").disabled = !busy;
}

function compare() {
  if (chats.length > 1) {
    chats.pop().element.remove();
  } else {
    chats.push(new Chat(key));
    element("chats").append(chats[1].element);
    guarded(refresh, (message) => showState(message, true));
  }
  element("compare").setAttribute("aria-pressed", String(chats.length > 1));
}

function clear() {
  running?.abort();
  for (const chat of chats) chat.clear();
  element("prompt").focus();
}

function start() {
  element("chats").append(chats[0].element);
  element("composer").addEventListener("submit", send);
  element("stop").addEventListener("click", () => running?.abort());
  element("compare").addEventListener("click", compare);
  element("clear").addEventListener("click", clear);
  element("load").addEventListener("submit", (event) => guarded(() => load(event), tell));
  element("set-key").addEventListener("click", askForKey);
  element("key-dialog").addEventListener("close", () => {
    if (element("key-dialog").returnValue !== "use") return;
    sessionStorage.setItem(KEY, element("key").value.trim());
    element("key").value = "";
    guarded(refresh, (message) => showState(message, true)).then(watch);
  });
  element("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    element("composer").requestSubmit();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  guarded(refresh, (message) => showState(message, true));
  watch();
  setInterval(watch, EVERY);
}

start();
