"use strict";
// The server's interface: one model, streams of answers, and errors with advice.

class ServerError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

async function ask(path, body, signal) {
  const headers = { "content-type": "application/json" };
  if (store.key()) headers.authorization = `Bearer ${store.key()}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.", { code: "unreachable" });
  }
  if (response.ok) return response;
  const found = readJson(await response.text())?.error ?? {};
  const retryAfter = Number(response.headers.get("retry-after")) || 0;
  throw new ServerError(found.message ?? `The server answered with status ${response.status}.`, {
    status: response.status, code: found.code, retryAfter,
  });
}

/** The first model: {id, max_model_len, backend, and sampling or, of one that makes embeddings, dimensions}. */
async function findModel() {
  const answer = await (await ask("v1/models")).json();
  return answer.data[0];
}

/** Yields the chunks of a streamed answer. */
async function* stream(path, body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await ask(path, { ...body, ...options }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", done = false;
  while (!done) {
    const piece = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection broke in the middle of the answer.", { code: "broken" });
    });
    if (piece.done) break;
    const events = (rest + piece.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") {
        done = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, { code: chunk.error.code, status: 200 });
      yield chunk;
    }
  }
  if (!done) throw new ServerError("The connection broke in the middle of the answer.", { code: "broken" });
}

/** What to tell of an error, and which action helps: "retry", "key", "new" or none. */
function advice(error) {
  if (error.status === 401) return ["This server needs an API key.", "key"];
  if (error.status === 429) return ["The server is busy with other requests. Try again in a moment.", "retry"];
  if (error.code === "loading") return ["The model is still being loaded. It will be ready soon.", "wait"];
  if (error.code === "draining") return ["The server is shutting down. Try again when it is back.", "retry"];
  if (error.code === "unreachable") return ["The server cannot be reached. Is it running?", "retry"];
  if (error.code === "context_length_exceeded")
    return ["This conversation is longer than the model's context. Start a new chat, or shorten a message.", "new"];
  if (error.status === 400) return [`The server refused the request: ${error.message}`, null];
  return [error.message, "retry"];
}
