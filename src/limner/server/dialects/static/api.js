// Calls of the server: the key, errors as the server words them, events. Knows nothing of the page but how to ask for a key.

const KEY = "limner.key";

export class Refused extends Error {
  /** What the server answered instead: its status, its message, and the field that it names, if any; `index` of several. */
  constructor(status, message, field, { type = "", index = null } = {}) {
    super(message);
    Object.assign(this, { status, field, type, index });
  }
}

let askForKey = async () => null;
let asking = null;

/** `ask(problem)` gives a key that the user typed. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

async function refusal(response) {
  let message = `${response.status} ${response.statusText}`, field = "", more = {};
  try {
    const { detail, error } = await response.json();
    if (error) message = error.message;
    else if (Array.isArray(detail) && detail.length) {
      const place = (entry) => (entry.loc || []).filter((part) => part !== "body"), [{ type }] = detail;
      field = place(detail[0]).filter((part) => typeof part === "string").join(".");
      more = { type, index: place(detail[0]).find((part) => typeof part === "number") };
      message = detail.map((entry) => {
        const where = place(entry), [first] = String(where[0] ?? "").split(" ");
        return where.length && !entry.msg.startsWith(first) ? `${where.join(".")}: ${entry.msg}` : entry.msg;
      }).join("; ");
    } else if (typeof detail === "string") message = detail;
  } catch { /* the status says what there is to say */ }
  return new Refused(response.status, message, field, more);
}

/** As `fetch`, and tells the share of the body that has left; fetch does not tell it. */
function upload(path, { method, headers, body, signal, onProgress }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open(method, path);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.responseType = "blob";
    request.upload.onprogress = ({ lengthComputable, loaded, total }) => { if (lengthComputable) onProgress(loaded / total); };
    request.onload = () => resolve(new Response(request.response, { status: request.status, statusText: request.statusText }));
    request.onerror = () => reject(new TypeError("the connection failed"));
    request.onabort = () => reject(new DOMException("aborted", "AbortError"));
    signal?.addEventListener("abort", () => request.abort());
    request.send(body);
  });
}

async function answer(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    let response;
    try {
      const send = options.onProgress ? upload : fetch;
      response = await send(path, { ...options, headers: { ...options.headers, ...(key ? { "x-key": key } : {}) } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(0, "The server does not answer. Is limner serve still running?", "");
    }
    if (response.ok) return response;
    const refused = await refusal(response);
    if (refused.status !== 401 && refused.status !== 403) throw refused;
    if (sessionStorage.getItem(KEY) !== key) continue; // another call has asked meanwhile
    asking ??= askForKey(key ? refused.message : "").finally(() => { asking = null; });
    const typed = await asking;
    if (!typed) throw refused;
    sessionStorage.setItem(KEY, typed);
  }
}

export async function get(path) {
  return (await answer(path)).json();
}

/** `onProgress(share)` is told how much of the body has left. */
export async function post(path, body, { signal, onProgress } = {}) {
  const form = body instanceof FormData;
  const headers = form ? {} : { "content-type": "application/json" };
  return (await answer(path, { method: "POST", headers, body: form ? body : JSON.stringify(body), signal, onProgress })).json();
}

export async function remove(path) {
  return (await answer(path, { method: "DELETE" })).json();
}

export async function blob(path) {
  return (await answer(path)).blob();
}

const pictures = new Map();

/** A URL for an <img> of what a path gives; it works for paths that need the key too. */
export function pictureURL(path) {
  if (!pictures.has(path)) {
    const made = blob(path).then((data) => URL.createObjectURL(data));
    made.catch(() => pictures.delete(path));
    pictures.set(path, made);
  }
  return pictures.get(path);
}

/** The data of each event of a stream. EventSource cannot send the key, so the stream is read by hand. */
export async function* events(path, { signal }) {
  const reader = (await answer(path, { signal })).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (data) yield JSON.parse(data);
    }
  }
}
