"use strict";
// A model that makes embeddings has nothing to talk to: the page tells how programs ask it.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`; // for a shell

/** Puts the explanation in the place of the chat. model: as `findModel` returns it, with `dimensions`. */
function showGuide(model) {
  const base = new URL("v1", location.href).href, key = Boolean(store.key());
  const size = model.dimensions.toLocaleString(), most = model.max_model_len.toLocaleString();
  const shell = [
    `curl ${quoted(`${base}/embeddings`)}`,
    ...(key ? ['-H "Authorization: Bearer $API_KEY"'] : []),
    "-H 'Content-Type: application/json'",
    `-d ${quoted(JSON.stringify({ model: model.id, input: ["a fox", "a wolf"] }))}`,
  ];
  const python = [
    ...(key ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${key ? 'os.environ["API_KEY"]' : '"none"'})`,
    'texts = ["a fox in the snow", "a wolf in winter"]',
    `found = client.embeddings.create(model=${JSON.stringify(model.id)}, input=texts)`,
    "fox, wolf = (each.embedding for each in found.data)",
    "print(sum(x * y for x, y in zip(fox, wolf)))",
  ];
  renderMarkdown(by("guide"), [
    `Its model makes embeddings: of each text a vector of ${size} numbers, whose length is 1. `
      + "The dot product of two vectors is how alike their texts are. There is nothing to chat with: it writes no text.",
    "### From a shell", `~~~\n${shell.join(" \\\n  ")}\n~~~`,
    "### From Python, with OpenAI's client", `~~~\n${python.join("\n")}\n~~~`,
    `A text may have up to ${most} tokens. Many texts go into one request, as a list; `
      + "`dimensions` asks for only the first numbers of each vector.",
  ].join("\n\n"));
  document.body.classList.add("embeds");
  by("embed-panel").hidden = false;
}
