"use strict";
// What surrounds the chats: banner, model, raw text, panels, settings, and all events.

const STARTERS = [
  "Tell me a story about a fox and a lantern.",
  "Tell me a story about a dog and a kite.",
  "Hello! What can you do?",
];
const FIELDS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

let model = null;
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
  document.title = by("model").title = model.id;
  by("model").replaceChildren(model.id, element("small", { textContent: `on ${model.backend}` }));
  if (model.dimensions) {
    showGuide(model);
    return;
  }
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
  if (found.error) tellError(found.error, () => { selectTab("text"); continueText(); });
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
  by("unused").textContent = "";
  by("system").value = settings.system ?? "";
  by("theme").value = settings.theme ?? "";
  by("key").value = store.key();
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}

function readSettings() {
  const elements = by("settings-form").elements;
  for (const name of [...FIELDS, "stop"]) settings[name] = elements[name].validity.valid ? elements[name].value : "";
  const wrong = FIELDS.map((name) => elements[name]).find((field) => !field.validity.valid);
  by("unused").textContent = wrong ? `${wrong.labels[0].innerText.trim()} is not used: ${wrong.validationMessage}` : "";
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
