"use strict";
// Chats: one is open, and at most one answer is under way, here or in the raw text.

let chat = store.chats()[0] ?? store.newChat();
let running = null; // the AbortController of the answer under way

function showChats() {
  const chats = store.chats();
  by("no-chats").hidden = false;
  by("chat-list").replaceChildren(...chats.map((entry) => {
    const open = element("button", { type: "button", className: "open", title: titleOf(entry), onclick: () => openChat(store.chat(entry.id) ?? chat) });
    open.append(element("span", { textContent: titleOf(entry) }));
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

/** Notes how much of the context a chat takes whose last answer was stopped, so that the server told no number. */
async function countContext(own, messages) {
  const last = messages.at(-1), told = messages.map(({ role, content }) => ({ role, content }));
  const response = await ask("tokenize", { messages: told, add_generation_prompt: false }).catch(() => null);
  const count = (await response?.json())?.count;
  if (!count || own.messages.at(-1) !== last || own.removed) return;
  own.context = count;
  store.save(own);
  if (chat === own) showContext();
}

async function answer() {
  hush();
  const own = chat, message = { role: "assistant", content: "", thought: "", note: "" };
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
  const plan = () => {
    if (!planned) planned = Boolean(requestAnimationFrame(draw));
  };
  const found = await generate("v1/chat/completions", { messages: sent, truncation: "auto" }, (text) => {
    message.content += text;
    plan();
  }, ({ delta }) => {
    if (delta.reasoning_content) {
      message.thought += delta.reasoning_content;
      plan();
    }
    return delta.content;
  });
  message.note = noteOf(found);
  message.detail = `first text after ${(found.first / 1000).toFixed(2)} s`;
  if (found.usage) own.context = found.usage.total_tokens;
  else if (message.content) countContext(own, [...sent, message]);
  if (found.error && !message.content) own.messages.pop();
  if (own.messages.length && !own.removed) store.save(own);
  if (chat !== own) return;
  showAll();
  if (!found.error) return;
  tellError(found.error, () => {
    selectTab("chat");
    if (chat === own) regenerate();
  });
  follow(true); // the banner takes some of the room
}
