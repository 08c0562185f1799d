// The server: requests, its key, its errors, its streams of events.

const HELD = "tieredkv.key";

/** What the server answered instead of what was asked for. */
export class Refusal extends Error {
  constructor(status, body, headers) {
    super(body?.error?.message ?? (typeof body?.detail === "string" ? body.detail : `The server answered with error ${status}.`));
    this.status = status;
    this.code = body?.error?.code ?? null;
    const wait = Number.parseInt(headers?.get("retry-after") ?? "", 10);
    this.wait = Number.isFinite(wait) ? Math.max(1, wait) : null;
  }
}

const STATUSES = { invalid_request_error: 400, authentication_error: 401, permission_error: 403, rate_limit_error: 429 };

/** No answer: the server, or the way to it, is gone. */
export class Gone extends Error {}

export const stopped = (error) => error?.name === "AbortError";
const at = (path) => new URL(path, document.baseURI).href;
export const contentUrl = (id) => at(`v1/files/${encodeURIComponent(id)}/content`);
export const frameUrl = (id, time, width) =>
  at(`v1/files/${encodeURIComponent(id)}/frame?time=${Math.max(0, time).toFixed(2)}&width=${width}`);

const key = () => sessionStorage.getItem(HELD);
const authorization = () => (key() ? { Authorization: `Bearer ${key()}` } : {});

/** Set by the page: shows a dialog and resolves to a key. */
let askForKey = null;
let asking = null;
export function onKeyNeeded(ask) { askForKey = ask; }

/** Asks for a key until one is accepted; questions that fail at the same time share the dialog. */
export function needKey() {
  asking ??= (async () => {
    for (let tries = key() ? 1 : 0; ; tries += 1) {
      const typed = await askForKey(tries > 0);
      if (!/^[\x21-\x7e]+$/.test(typed)) continue; // no server has such a key, and fetch cannot send it
      sessionStorage.setItem(HELD, typed);
      if (await login()) return;
    }
  })().finally(() => { asking = null; });
  return asking;
}

/** Exchanges the key for a cookie, which <video> and <img> can send. False: the key is wrong. */
async function login() {
  const response = await reach("v1/tieredkv/login", { method: "POST", headers: authorization() });
  return response.status !== 401;
}

let renewing = null;

/** Logs in with the key of this tab, or asks for one; and again each hour, as a login does not last. */
export async function ready(needed) {
  if (!needed) return;
  if (!(key() && (await login()))) await needKey();
  renewing ??= setInterval(() => { login().catch(() => {}); }, 3_600_000); // a server that is gone is noticed elsewhere
}

async function reach(path, options) {
  try {
    return await fetch(at(path), options);
  } catch (error) {
    if (stopped(error)) throw error;
    throw new Gone("The connection to the server was lost.");
  }
}

async function refusal(response) {
  let body = null;
  try { body = await response.json(); } catch { /* not JSON, as from a proxy: the status says enough */ }
  return new Refusal(response.status, body, response.headers);
}

/** A request with the key; asks for one and tries once more where it is missing. */
export async function request(path, { body, ...options } = {}) {
  const send = () => reach(path, {
    ...options,
    body: body === undefined ? undefined : JSON.stringify(body),
    headers: { ...authorization(), ...(body === undefined ? {} : { "Content-Type": "application/json" }) },
  });
  let response = await send();
  if (response.status === 401 && askForKey) {
    await needKey();
    response = await send();
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export const json = async (path, options) => (await request(path, options)).json();

/** The JSON of each event. Raises Gone if the stream ends before its end is announced: by [DONE], or by `last`. */
export async function* events(path, options, last = () => false) {
  const response = await request(path, { method: "POST", ...options });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let complete = false;
  try {
    for (;;) {
      let read;
      try { read = await reader.read(); } catch (error) {
        if (stopped(error)) throw error;
        throw new Gone("The connection to the server was lost.");
      }
      if (read.done) break;
      const blocks = (rest + read.value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
        if (data === "") continue; // a comment that keeps the connection alive
        if (data === "[DONE]") { complete = true; continue; }
        const event = JSON.parse(data);
        if (event.error) throw new Refusal(STATUSES[event.error.type] ?? 500, event, null);
        complete ||= last(event);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the request may have been stopped already
  }
  if (!complete) throw new Gone("The connection to the server was lost before the end.");
}

/** Sends a file. `progress(sent, total)` is called while it goes. */
export async function upload(file, progress, signal) {
  for (let tries = 0; ; tries += 1) {
    try {
      return await sendFile(file, progress, signal);
    } catch (error) {
      if (error.status !== 401 || tries > 0) throw error;
      await needKey();
    }
  }
}

function sendFile(file, progress, signal) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("purpose", "user_data");
    form.append("file", file, file.name);
    const sending = new XMLHttpRequest();
    sending.open("POST", at("v1/files"));
    for (const [name, value] of Object.entries(authorization())) sending.setRequestHeader(name, value);
    sending.upload.onprogress = (event) => progress(Math.min(event.loaded, file.size), file.size);
    sending.onload = () => {
      let body = null;
      try { body = JSON.parse(sending.responseText); } catch { /* not JSON: the status says enough */ }
      if (sending.status >= 200 && sending.status < 300 && body) resolve(body);
      else reject(new Refusal(sending.status, body, { get: (name) => sending.getResponseHeader(name) }));
    };
    sending.onerror = () => reject(new Gone("The connection to the server was lost during the upload."));
    sending.onabort = () => reject(new DOMException("stopped", "AbortError"));
    signal.addEventListener("abort", () => sending.abort());
    sending.send(form);
  });
}

/** Resolves when the server answers again. */
export async function back() {
  for (let wait = 1000; ; wait = Math.min(10000, wait * 1.5)) {
    await new Promise((resolve) => { setTimeout(resolve, wait); });
    try {
      if ((await fetch(at("health"), { cache: "no-store" })).ok) return;
    } catch { /* still gone */ }
  }
}
