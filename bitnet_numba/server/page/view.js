"use strict";
// Messages on the page. Answers are Markdown; everything in them that could load or run something is removed.

const by = (id) => document.getElementById(id);

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "b", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "li", "ol", "p",
    "pre", "s", "strong", "sub", "sup", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
};

const escaped = (text) => text.replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);
// HTML that a model writes is shown as it is written, and a picture as its description.
marked.use({ breaks: true, renderer: { html: ({ text }) => escaped(text), image: ({ text }) => escaped(text) } });

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function button(text, onclick, label) {
  const made = element("button", { type: "button", className: "quiet", textContent: text, onclick });
  if (label) made.setAttribute("aria-label", label);
  return made;
}

/** Puts an answer into an element. */
function renderMarkdown(target, text) {
  const fragment = DOMPurify.sanitize(marked.parse(text), { ...ALLOWED, RETURN_DOM_FRAGMENT: true });
  for (const link of fragment.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const wide of fragment.querySelectorAll("pre, table")) wide.tabIndex = 0; // the keyboard can scroll them
  for (const block of fragment.querySelectorAll("pre")) {
    const frame = element("div", { className: "code" });
    block.replaceWith(frame);
    const text = block.textContent;
    frame.append(block, copyButton(() => text, "Copy code"));
  }
  target.replaceChildren(fragment);
}

function copyButton(read, label) {
  const made = button("Copy", async () => {
    const copied = await copy(read());
    made.textContent = copied ? "Copied" : "Not allowed";
    setTimeout(() => { made.textContent = "Copy"; }, 1500);
  }, label);
  return made;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

/** A message as an element. actions: what can be done with it, by label. */
function messageElement(message, actions) {
  const body = element("div", { className: "body" });
  const speaker = element("span", { className: "hidden", textContent: message.role === "user" ? "You: " : "Answer: " });
  const tools = element("div", { className: "tools" }, copyButton(() => message.content, "Copy message"));
  for (const [label, act] of Object.entries(actions)) tools.append(button(label, act));
  tools.append(element("span", { className: "status" }));
  const made = element("article", { className: `message ${message.role}` }, speaker, body, tools);
  showContent(made, message);
  return made;
}

function showContent(target, message) {
  const body = target.querySelector(".body");
  if (message.role === "user") body.textContent = message.content;
  else {
    renderMarkdown(body, message.content);
    if (message.thought) {
      const summary = element("summary", { textContent: "Thought" });
      const text = element("div", { className: "thought", textContent: message.thought });
      body.prepend(element("details", { open: !message.content }, summary, text));
    }
  }
  Object.assign(target.querySelector(".status"), { textContent: message.note ?? "", title: message.detail ?? "" });
}

/** Turns a user's message into a field; calls `save` with the new text. */
function editElement(target, message, save, cancel) {
  const field = element("textarea", { value: message.content });
  field.setAttribute("aria-label", "Edit message");
  const send = element("button", { type: "button", className: "main", textContent: "Send", onclick: () => save(field.value) });
  field.onkeydown = (event) => {
    if (event.key === "Escape") cancel();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      save(field.value);
    }
  };
  target.classList.add("editing");
  target.replaceChildren(field, element("div", { className: "row" }, send, button("Cancel", cancel)));
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
}

/** The speed of an answer in words; `seconds` from the request to its last text. */
function speed(tokens, seconds) {
  const perSecond = tokens / seconds, digits = perSecond < 100 ? 1 : 0;
  const rate = seconds > 0 ? `${perSecond.toLocaleString(undefined, { maximumFractionDigits: digits })} tokens/s · ` : "";
  return `${rate}${tokens} ${tokens === 1 ? "token" : "tokens"}`;
}
