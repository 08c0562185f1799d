// What went wrong, in words, with a way on.

import { Gone, Refusal } from "./api.js";
import { el } from "./dom.js";
import { duration, sentence } from "./text.js";

/** Title, sentence and kind of an error. */
export function describe(error) {
  if (error instanceof Gone) return { kind: "gone", title: "Connection lost", text: error.message };
  if (!(error instanceof Refusal)) return { kind: "failed", title: "Something went wrong on this page", text: String(error?.message ?? error) };
  const text = sentence(error.message);
  if (error.status === 429 || error.code === "queue_full") {
    return { kind: "busy", title: "The server is busy", text: error.wait ? `${text} It asks to wait ${duration(error.wait)}.` : text, wait: error.wait ?? 5 };
  }
  if (error.code === "shutting_down") return { kind: "gone", title: "The server is being stopped", text };
  if (error.status === 504 || error.code === "timeout") return { kind: "slow", title: "It took too long", text };
  if (error.status >= 500) return { kind: "failed", title: "The server failed", text };
  return { kind: "refused", title: "The server refused", text };
}

/** A box with the error. `again(keep)` tries once more; a server that is busy may be tried until it answers, and `keep`
 * says that this was asked for. */
export function notice(error, again, keep = false) {
  const { kind, title, text, wait } = describe(error);
  const row = el("div", { class: "row" });
  const box = el("div", { class: `notice ${kind}`, role: "alert" }, el("strong", {}, title), el("p", {}, text), row);
  const tryLater = () => countDown(row, wait, () => again(true), choose);
  const choose = () => {
    row.replaceChildren(el("button", { type: "button", onclick: () => again(false) }, "Try again"));
    if (kind === "busy") row.append(el("button", { type: "button", onclick: tryLater }, "Keep trying"));
  };
  if (kind === "busy" && keep) tryLater();
  else choose();
  return box;
}

function countDown(row, wait, again, stop) {
  let left = wait;
  const text = el("span", { class: "soft" });
  const tell = () => { text.textContent = left > 0 ? `Trying again in ${left} s` : "Trying again"; };
  const timer = setInterval(() => {
    left -= 1;
    tell();
    if (!row.isConnected) clearInterval(timer);
    else if (left <= 0) { clearInterval(timer); again(); }
  }, 1000);
  tell();
  row.replaceChildren(text, el("button", { type: "button", onclick: () => { clearInterval(timer); stop(); } }, "Stop trying"));
}
