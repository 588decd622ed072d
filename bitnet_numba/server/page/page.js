"use strict";
// The page's behaviour: one chat is open, at most one answer is under way.

const STARTERS = [
  "Tell me a story about a fox and a lantern.",
  "Tell me a story about a dog and a kite.",
  "Hello! What can you do?",
];
const FIELDS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

let chat = store.chats()[0] ?? store.newChat();
let model = null;
let running = null; // the AbortController of the answer under way
let settings = store.settings();

// ---- banner

function tell(text, action = null, act = null) {
  by("banner-text").textContent = text;
  by("banner-action").hidden = !action;
  by("banner-action").textContent = action ?? "";
  by("banner-action").onclick = () => { hush(); act(); };
  by("banner").hidden = false;
}

function hush() {
  by("banner").hidden = true;
}

function tellError(error, again) {
  const [text, what] = advice(error);
  if (what === "key") tell(text, "Enter the key", () => { toggle("settings", true); by("key").focus(); });
  else if (what === "new") tell(text, "New chat", newChat);
  else if (what === "wait") { tell(text); setTimeout(() => { hush(); again(); }, 1500); }
  else if (what === "retry") tell(text, "Try again", again);
  else tell(text);
}

// ---- model and context

async function connect() {
  try {
    model = await findModel();
  } catch (error) {
    tellError(error, connect);
    return;
  }
  document.title = model.id;
  by("model").replaceChildren(model.id, element("small", { textContent: `on ${model.backend}` }));
  for (const [name, value] of Object.entries(model.sampling)) {
    const input = by("settings-form").elements[name];
    if (input) input.placeholder = String(value);
  }
  showContext();
}

function showContext() {
  const used = chat.context ?? 0, most = model?.max_model_len;
  by("context-bar").hidden = by("context-text").hidden = !most;
  if (!most) return;
  by("context-bar").value = Math.min(used / most, 1);
  by("context-text").textContent = `${used.toLocaleString()} of ${most.toLocaleString()} tokens of context`;
}

// ---- chats

function showChats() {
  const chats = store.chats();
  by("no-chats").hidden = false;
  by("chat-list").replaceChildren(...chats.map((entry) => {
    const open = element("button", { type: "button", className: "open", textContent: titleOf(entry), onclick: () => openChat(store.chat(entry.id) ?? chat) });
    if (entry.id === chat.id) open.setAttribute("aria-current", "true");
    const remove = element("button", { type: "button", className: "remove", textContent: "✕", onclick: () => removeChat(entry) });
    remove.setAttribute("aria-label", `Delete ${titleOf(entry)}`);
    return element("li", {}, open, remove);
  }));
}

function openChat(entry) {
  running?.abort();
  chat = entry;
  hush();
  if (narrow()) toggle("chats", false);
  showAll();
  by("prompt").focus();
}

function newChat() {
  openChat(store.newChat());
}

function removeChat(entry) {
  store.remove(entry);
  if (entry.id === chat.id) leaveRemoved();
  showChats();
}

/** Leaves the open chat, which is not to be saved any more. */
function leaveRemoved() {
  chat.removed = true;
  newChat();
}

function save() {
  if (chat.messages.length && !store.save(chat)) tell("The browser has no room for more chats. Export and delete some.", "Chats", () => toggle("chats", true));
}

// ---- messages

function showAll() {
  by("welcome").hidden = chat.messages.length > 0;
  by("messages").replaceChildren(...chat.messages.map((message, index) => show(message, index)));
  showChats();
  showContext();
  follow(true);
}

function show(message, index) {
  const actions = {};
  const last = index === chat.messages.length - 1;
  if (message.role === "user") actions.Edit = () => edit(index);
  if (last) actions[message.role === "user" ? "Get an answer" : "Regenerate"] = regenerate;
  return messageElement(message, actions);
}

function edit(index) {
  if (running) return;
  const target = by("messages").children[index];
  editElement(target, chat.messages[index], (text) => {
    if (!text.trim()) return;
    chat.messages.length = index;
    send(text);
  }, showAll);
}

function regenerate() {
  if (running) return;
  if (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
  answer();
}

function send(text) {
  chat.messages.push({ role: "user", content: text });
  answer();
}

function follow(force = false) {
  const scroll = by("scroll");
  if (force || scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 120) scroll.scrollTop = scroll.scrollHeight;
}

// ---- answers

function sampling() {
  const given = {};
  for (const name of FIELDS) {
    const value = settings[name];
    if (value !== undefined && value !== "" && Number.isFinite(Number(value))) given[name] = Number(value);
  }
  if (settings.stop) given.stop = [settings.stop];
  return given;
}

function setRunning(controller) {
  running = controller;
  for (const [go, stop] of [["send", "stop"], ["text-go", "text-stop"]]) {
    by(go).hidden = Boolean(controller);
    by(stop).hidden = !controller;
  }
  by("messages").setAttribute("aria-busy", String(Boolean(controller)));
}

/** Streams an answer: `onText` gets each piece; returns what is known of it, even if it was stopped or failed. */
async function generate(path, body, onText, textOf) {
  const controller = new AbortController();
  setRunning(controller);
  const began = performance.now();
  const found = { tokens: 0, pieces: 0, first: 0, last: 0, usage: null, error: null, stopped: false };
  try {
    for await (const chunk of stream(path, { ...sampling(), ...body }, controller.signal)) {
      if (chunk.usage) found.usage = chunk.usage;
      const text = chunk.choices[0] ? textOf(chunk.choices[0]) : "";
      if (!text) continue;
      found.last = performance.now() - began;
      if (!found.pieces++) found.first = found.last;
      onText(text);
    }
  } catch (error) {
    found.stopped = error.name === "AbortError";
    if (!found.stopped) found.error = error;
  }
  if (running === controller) setRunning(null);
  return found;
}

function noteOf(found) {
  if (found.usage) {
    const dropped = found.usage.prompt_tokens_details?.dropped_messages;
    const note = speed(found.usage.completion_tokens, found.last / 1000);
    return dropped ? `${note} · without the ${dropped} oldest messages` : note;
  }
  return found.stopped ? "stopped" : "broken off";
}

async function answer() {
  hush();
  const own = chat, message = { role: "assistant", content: "", note: "" };
  const sent = own.messages.map(({ role, content }) => ({ role, content }));
  if (settings.system?.trim()) sent.unshift({ role: "system", content: settings.system });
  own.messages.push(message);
  save();
  showAll();
  const target = by("messages").lastElementChild;
  target.classList.add("waiting");
  let planned = false;
  const draw = () => {
    planned = false;
    if (chat !== own) return;
    target.classList.remove("waiting");
    showContent(target, message);
    follow();
  };
  const found = await generate("v1/chat/completions", { messages: sent, truncation: "auto" }, (text) => {
    message.content += text;
    if (!planned) planned = Boolean(requestAnimationFrame(draw));
  }, (choice) => choice.delta.content);
  message.note = noteOf(found);
  message.detail = `first text after ${(found.first / 1000).toFixed(2)} s`;
  if (found.usage) own.context = found.usage.total_tokens;
  if (found.error && !message.content) own.messages.pop();
  if (own.messages.length && !own.removed) store.save(own);
  if (chat !== own) return;
  showAll();
  if (found.error) tellError(found.error, () => { if (chat === own) regenerate(); });
}

// ---- raw text

const undo = [];

async function continueText() {
  hush();
  const field = by("text"), before = field.value;
  if (!before) return;
  undo.push(before);
  by("text-status").textContent = "";
  field.readOnly = true;
  const limit = settings.max_tokens ? {} : { max_tokens: 128 };
  const found = await generate("v1/completions", { ...limit, prompt: before }, (text) => {
    const atEnd = field.scrollHeight - field.scrollTop - field.clientHeight < 80;
    field.value += text;
    if (atEnd) field.scrollTop = field.scrollHeight;
  }, (choice) => choice.text);
  field.readOnly = false;
  by("text-status").textContent = noteOf(found);
  by("text-undo").disabled = false;
  store.saveText(field.value);
  if (found.error) tellError(found.error, continueText);
}

// ---- panels, tabs, settings

const narrow = () => matchMedia("(max-width: 60rem)").matches;

function toggle(name, open = by(name).hidden) {
  if (open && narrow()) for (const other of ["chats", "settings"]) if (other !== name) toggle(other, false);
  by(name).hidden = !open;
  by(`show-${name}`).setAttribute("aria-expanded", String(open));
}

function selectTab(name) {
  for (const tab of ["chat", "text"]) {
    by(`${tab}-panel`).hidden = tab !== name;
    by(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
    by(`tab-${tab}`).tabIndex = tab === name ? 0 : -1;
  }
}

function showSettings() {
  const elements = by("settings-form").elements;
  for (const name of [...FIELDS, "stop"]) elements[name].value = settings[name] ?? "";
  by("system").value = settings.system ?? "";
  by("theme").value = settings.theme ?? "";
  by("key").value = store.key();
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}

function readSettings() {
  const elements = by("settings-form").elements;
  for (const name of [...FIELDS, "stop"]) settings[name] = elements[name].validity.valid ? elements[name].value : "";
  settings.system = by("system").value;
  settings.theme = by("theme").value;
  const key = by("key").value.trim(), changed = key !== store.key();
  store.saveKey(key);
  store.saveSettings(settings);
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
  if (changed) { hush(); connect(); }
}

function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

// ---- events

by("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = by("prompt").value;
  if (running || !text.trim()) return;
  by("prompt").value = "";
  grow(by("prompt"));
  send(text);
};
by("prompt").oninput = () => grow(by("prompt"));
by("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    by("composer").requestSubmit();
  }
};
by("text-form").onsubmit = (event) => {
  event.preventDefault();
  if (!running) continueText();
};
by("text").onchange = () => store.saveText(by("text").value);
by("text-undo").onclick = () => {
  by("text").value = undo.pop();
  by("text-undo").disabled = !undo.length;
  store.saveText(by("text").value);
};
by("stop").onclick = by("text-stop").onclick = () => running?.abort();
by("new-chat").onclick = newChat;
by("show-chats").onclick = () => toggle("chats");
by("show-settings").onclick = () => toggle("settings");
by("banner-close").onclick = hush;
by("tab-chat").onclick = () => selectTab("chat");
by("tab-text").onclick = () => selectTab("text");
document.querySelector(".tabs").onkeydown = (event) => {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  const other = by("tab-chat").getAttribute("aria-selected") === "true" ? "text" : "chat";
  selectTab(other);
  by(`tab-${other}`).focus();
};
by("settings-form").onchange = readSettings;
by("settings-form").onsubmit = (event) => event.preventDefault();
by("reset").onclick = () => {
  settings = {};
  store.saveSettings(settings);
  showSettings();
};
by("export").onclick = () => {
  const url = URL.createObjectURL(store.exported());
  element("a", { href: url, download: "bitnet_numba-chats.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
};
by("delete-all").onclick = () => {
  if (!confirm("Delete all chats of this browser?")) return;
  store.chats().forEach((entry) => store.remove(entry));
  leaveRemoved();
};
document.onkeydown = (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else for (const name of ["chats", "settings"]) if (narrow()) toggle(name, false);
};
addEventListener("pagehide", () => { if (running) save(); });

for (const text of STARTERS) {
  by("starters").append(element("li", {}, element("button", { type: "button", textContent: text, onclick: () => send(text) })));
}
by("text").value = store.text();
showSettings();
if (!narrow()) toggle("chats", true);
showAll();
connect();
