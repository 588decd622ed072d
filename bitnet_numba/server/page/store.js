"use strict";
// What the browser keeps: chats, one entry each, and settings. The key of the server stays in this tab's session.

const CHAT_PREFIX = "bitnet_numba.chat.";
const SETTINGS = "bitnet_numba.settings";
const TEXT = "bitnet_numba.text";
const KEY = "bitnet_numba.key";

const store = {
  /** All chats, the newest first: {id, created, messages: [{role, content, note}]}. */
  chats() {
    const found = [];
    for (const key of Object.keys(localStorage)) {
      if (key.startsWith(CHAT_PREFIX)) {
        const chat = readJson(localStorage.getItem(key));
        if (chat && Array.isArray(chat.messages)) found.push(chat);
      }
    }
    return found.sort((a, b) => b.created - a.created);
  },

  chat(id) {
    return readJson(localStorage.getItem(CHAT_PREFIX + id));
  },

  newChat() {
    return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, created: Date.now(), messages: [] };
  },

  /** False if there is no room left. */
  save(chat) {
    return this.write(CHAT_PREFIX + chat.id, chat);
  },

  remove(chat) {
    localStorage.removeItem(CHAT_PREFIX + chat.id);
  },

  settings() {
    return readJson(localStorage.getItem(SETTINGS)) ?? {};
  },

  saveSettings(settings) {
    return this.write(SETTINGS, settings);
  },

  text() {
    return readJson(localStorage.getItem(TEXT)) ?? "";
  },

  saveText(text) {
    return this.write(TEXT, text);
  },

  key() {
    return sessionStorage.getItem(KEY) ?? "";
  },

  saveKey(key) {
    sessionStorage.setItem(KEY, key);
  },

  write(name, value) {
    try {
      localStorage.setItem(name, JSON.stringify(value));
      return true;
    } catch {
      return false;
    }
  },

  /** Everything as a file. */
  exported() {
    const content = { exported: new Date().toISOString(), settings: this.settings(), chats: this.chats() };
    return new Blob([JSON.stringify(content, null, 1)], { type: "application/json" });
  },
};

function readJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function titleOf(chat) {
  const first = chat.messages.find((message) => message.role === "user");
  return first ? first.content.trim().split("\n")[0].slice(0, 80) : "New chat";
}
