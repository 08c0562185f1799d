// The page: which film is shown, and what its parts tell each other.

import { add, ingest, progressText, unfit } from "./adding.js";
import * as api from "./api.js";
import { $, el, roving, say, sure } from "./dom.js";
import { onDrop } from "./dropping.js";
import { askForKey } from "./key.js";
import { describe, notice } from "./notice.js";
import * as player from "./player.js";
import * as store from "./store.js";
import * as talk from "./talk.js";
import { bytes } from "./text.js";
import * as timeline from "./timeline.js";

let info = { model: null, toy: false, demo: null, limits: {} };
let films = [];
let current = null;

// ---- start

async function start() {
  document.body.dataset.view = "loading";
  await meet();
  $("model").textContent = info.toy ? `${info.model}, a toy` : (info.model ?? "");
  $("version").textContent = info.version ? `tieredkv ${info.version}` : "";
  $("toy").hidden = !info.toy;
  $("toy").replaceChildren(
    el("strong", {}, "This model is a toy."),
    " It was trained on films that tieredkv draws itself and knows nothing else. To ask about real films, start the server with a real model: ",
    el("code", {}, "tieredkv serve -m MODEL"),
  );
  $("demo").hidden = !info.demo;
  $("limits").textContent = info.limits?.upload_bytes ? `Up to ${bytes(info.limits.upload_bytes)}. It goes to this server and nowhere else.` : "It goes to this server and nowhere else.";
  await list();
  const last = films.find((film) => store.nameOf(film) === store.lastFilm());
  if (current) show(current);
  else if (last) show(last);
  else welcome();
}

/** What the server is. One that was started again gives its demo film another id, and has forgotten this browser. */
async function meet() {
  info = { ...info, ...(await api.json("v1/tieredkv")) };
  await api.ready(info.key_needed);
  for (const film of films) if (film.demo && info.demo) film.id = info.demo.file_id;
}

/** A film of the server, with what is kept of it. */
function known(id, name) {
  const film = { id, name, demo: id === info.demo?.file_id };
  return { ...film, ...store.recall(film) };
}

/** The films on the server, with their conversations in this browser. */
async function list() {
  const { data } = await api.json("v1/files");
  const shown = new Map(films.filter((film) => film.id).map((film) => [film.id, film]));
  const there = data.map((file) => shown.get(file.id) ?? known(file.id, file.filename));
  films = [...films.filter((film) => !film.id || film.job), ...there.filter((film) => !film.job)];
  drawList();
}

// ---- the list of films

function drawList() {
  const focused = $("films").contains(document.activeElement);
  $("films").replaceChildren(...films.map((film) => {
    const [what] = film.job ? progressText(film.job) : [""];
    const part = film.job?.stage === "upload" || film.job?.stage === "ingest" ? film.job.done / (film.job.total || Infinity) : null;
    const state = film.job?.failed ? "Failed" : what ? `${what}${part === null ? "" : ` ${Math.floor(100 * part)}\u00a0%`}` : film.asking ? "Answering" : film.demo ? "The demo film" : "";
    return el("li", {}, el("button", { type: "button", "aria-current": String(film === current), onclick: () => { show(film); menu(false); } },
      el("span", { class: "name" }, film.name), state ? el("span", { class: "state" }, state) : null));
  }));
  roving($("films"), "button");
  if (focused) $("films").querySelector('[aria-current="true"]')?.focus();
}

function menu(open) {
  document.body.classList.toggle("menu", open);
  $("menu").setAttribute("aria-expanded", String(open));
}

// ---- one film

function welcome() {
  current = null;
  document.body.dataset.view = "welcome";
  $("welcome").hidden = false;
  $("film").hidden = $("talk").hidden = true;
  document.title = "tieredkv";
  drawList();
}

function show(film) {
  const other = film !== current;
  current = film;
  document.body.dataset.view = "film";
  $("welcome").hidden = true;
  $("film").hidden = $("talk").hidden = false;
  document.title = `${film.name} · tieredkv`;
  $("name").textContent = film.name;
  if (film.id) store.setLast(film);
  if (other) {
    player.show(film);
    talk.show(film);
    $("question").value = film.draft ?? "";
  }
  drawFilm(film);
}

/** What depends on a film's state. */
function drawFilm(film) {
  drawList();
  if (film !== current) return;
  drawJob(film);
  $("remove").hidden = !film.id || film.demo || Boolean(film.job && !film.job.failed);
  $("clear").hidden = film.turns.length === 0;
  $("send").textContent = film.asking ? "Stop" : "Ask";
  $("send").disabled = !film.id;
  $("hint").textContent = film.turns.length ? "" : film.demo ? "" : film.id ? (info.toy ? "The toy knows only films that tieredkv draws, such as the demo film." : "Ask what happens, who does it, or when.") : "You can ask as soon as the film is uploaded.";
  const questions = film.demo ? (info.demo?.questions ?? []) : [];
  const asked = new Set(film.turns.map((turn) => turn.question));
  const left = questions.filter((question) => !asked.has(question)).slice(0, 4);
  $("examples").hidden = left.length === 0 || Boolean(film.asking);
  $("examples").replaceChildren(...left.map((question) => el("button", { type: "button", onclick: () => talk.ask(film, question) }, question)));
}

function drawJob(film) {
  const { job } = film;
  $("job").hidden = !job;
  if (!job) { $("job").replaceChildren(); return; }
  if (job.failed) { $("job").replaceChildren(notice(job.failed, job.again, job.keep)); return; }
  if (job.stage === "stopped") {
    $("job").replaceChildren(el("div", { class: "row" }, el("span", {}, "The upload was stopped."), el("button", { type: "button", onclick: () => job.again() }, "Start it again")));
    return;
  }
  const focused = $("job").contains(document.activeElement);
  $("job").replaceChildren(talk.progressRow(job, () => job.stop.abort()));
  if (focused) $("job").querySelector("button").focus();
}

let told = { film: null, part: -1, stage: "" };

/** A film on its way made a step. A screen reader hears each stage and each quarter of it. */
function step(film, error) {
  const { job } = film;
  if (film === current && film.id && !job?.failed) { store.setLast(film); $("name").textContent = film.name; player.refresh(); }
  const part = job?.total ? Math.floor((4 * job.done) / job.total) : 0;
  if (job && !job.failed && (told.film !== film || told.stage !== job.stage || told.part !== part)) {
    told = { film, stage: job.stage, part };
    say(`${film.name}: ${progressText(job).join(" ")}`);
  }
  if (!job && !error) say(`${film.name} is ready. Ask about it.`);
  if (error) failed(error);
  drawFilm(film);
}

function take(files) {
  let first = null;
  for (const file of files) {
    const wrong = unfit(file, info.limits);
    if (wrong) { banner(wrong, 8000); continue; }
    const film = { id: null, name: file.name, blob: URL.createObjectURL(file), seconds: null, turns: [] };
    first ??= film;
    films.unshift(film);
    add(film, file, step);
  }
  if (first) { show(first); menu(false); $("question").focus({ preventScroll: true }); }
}

async function remove(film) {
  if (!(await sure(`Remove ${film.name}?`, "The film leaves the server, and its conversation leaves this browser.", "Remove"))) return;
  try {
    await api.request(`v1/files/${encodeURIComponent(film.id)}`, { method: "DELETE" });
  } catch (error) {
    if (error.status !== 404) { failed(error); banner(describe(error).text, 8000); return; }
  }
  film.asking?.abort();
  store.drop(film);
  if (film.blob) URL.revokeObjectURL(film.blob);
  films = films.filter((one) => one !== film);
  say(`${film.name} is removed.`);
  if (films.length) show(films[0]);
  else welcome();
  $("add").focus();
}

// ---- the connection

let hiding = 0;

function banner(text, forMs = 0) {
  clearTimeout(hiding);
  $("banner").textContent = text;
  $("banner").hidden = text === "";
  if (forMs) hiding = setTimeout(() => banner(""), forMs);
}

let watching = false;

/** Looks for a server that is gone until it is there again. */
async function failed(error) {
  if (describe(error).kind !== "gone" || watching || api.stopped(error)) return;
  watching = true;
  banner("The server cannot be reached. Looking for it …");
  await api.back();
  watching = false;
  banner("The server is back.", 4000);
  if (info.model === null) await begin();
  else await meet().then(list).catch(failed);
}

async function begin() {
  try {
    await start();
  } catch (error) {
    document.body.dataset.view = "failed";
    if (describe(error).kind === "gone") failed(error);
    else {
      $("main").append(notice(error, () => location.reload()));
    }
  }
}

// ---- what the reader does

talk.connect({
  model: () => info.model,
  chose: (film, moments, title, word) => { timeline.show(film, moments, title); $("whole").hidden = word === null; },
  changed: drawFilm,
  failed,
});
$("whole").onclick = () => { talk.wholeAnswer(); $("question").focus({ preventScroll: true }); };
for (const id of ["add", "choose"]) $(id).onclick = () => $("file").click();
$("file").onchange = () => { take([...$("file").files]); $("file").value = ""; };
$("try").onclick = () => {
  const film = films.find((one) => one.id === info.demo.file_id) ?? known(info.demo.file_id, "The demo film");
  if (!films.includes(film)) films.unshift(film);
  show(film);
  if (!film.turns.length && !film.job) ingest(film, step);
};
$("menu").onclick = () => menu(!document.body.classList.contains("menu"));
$("remove").onclick = () => remove(current);
$("clear").onclick = async () => {
  if (!(await sure("Clear this conversation?", "Its questions and answers leave this browser.", "Clear"))) return;
  current.asking?.abort();
  current.turns = [];
  store.keep(current);
  talk.show(current);
  drawFilm(current);
  $("question").focus();
};
$("forget").onclick = async () => {
  if (!(await sure("Clear all conversations?", "The films stay on the server.", "Clear all"))) return;
  for (const film of films) { film.asking?.abort(); film.turns = []; }
  store.dropAll();
  if (current) { talk.show(current); drawFilm(current); }
};
$("ask").onsubmit = (event) => {
  event.preventDefault();
  if (current.asking) { current.asking.abort(); return; }
  const question = $("question").value.trim();
  if (!question || !current.id) return;
  $("question").value = current.draft = "";
  talk.ask(current, question);
};
$("question").oninput = () => { if (current) current.draft = $("question").value; };
$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!current.asking) $("ask").requestSubmit();
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && document.body.classList.contains("menu")) { menu(false); $("menu").focus(); }
});

// Where there is one column, the moments come after the answer, in reading order as well as on the screen.
const wide = window.matchMedia("(min-width: 60rem)");
const arrange = () => { if (wide.matches) $("film").append($("found")); else $("turns").after($("found")); };
wide.addEventListener("change", arrange);
arrange();

window.addEventListener("beforeunload", (event) => {
  if (films.some((film) => film.job?.stage === "upload")) event.preventDefault(); // the browser asks first
});

onDrop(take);
api.onKeyNeeded(askForKey);
begin();
