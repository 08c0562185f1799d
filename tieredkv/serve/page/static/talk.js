// The conversation about one film: questions, answers as they stream, and words that can be chosen.

import { events, stopped } from "./api.js";
import { step, progressText } from "./adding.js";
import { $, el, roving, say } from "./dom.js";
import { notice } from "./notice.js";
import { keep } from "./store.js";
import { duration, merged, pack, several, unpack, words } from "./text.js";

const FAINT = 0.08; // of the attention: where no moment has more, none was looked at in particular
const log = $("log");
const drawn = new WeakMap();
let shown = null;
let chosen = { turn: null, word: null };
let hooks = null;

/** `hooks`: `model()`; `chose(film, moments, title, word)` when what is looked at changes; `changed(film)`; `gone()`. */
export function connect(given) { hooks = given; }

/** Shows a film's conversation, with the last answer chosen. */
export function show(film) {
  shown = film;
  $("turns").replaceChildren(...film.turns.map(article));
  choose(film.turns.findLast((turn) => turn.moments) ?? null);
  log.scrollTop = log.scrollHeight;
}

/** Chooses an answer, or the word at a place of it: the timeline then shows what it looked at. Returns that in words. */
function choose(turn, word = null) {
  const before = chosen.turn;
  chosen = { turn, word };
  if (before && before !== turn) draw(before);
  if (turn) draw(turn);
  if (!turn) { hooks.chose(shown, [], "", null); return ""; }
  const found = (word === null ? turn.moments : turn.words[word][1]).map(unpack);
  const who = word === null ? "The answer" : `“${turn.words[word][0].replace(/^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu, "") || turn.words[word][0]}”`;
  const title = !found.length
    ? `${who} looked at no moment in particular`
    : found[0].weight < FAINT
      ? `${who} looked all over the film, a little more at these moments`
      : `${who} looked at ${several(found.length, "moment")}`;
  hooks.chose(shown, found, title, word);
  return title;
}

export function wholeAnswer() {
  if (chosen.turn) say(choose(chosen.turn));
}

function article(turn) {
  const node = el("article", { class: "turn" });
  drawn.set(turn, node);
  draw(turn);
  return node;
}

function draw(turn) {
  const node = drawn.get(turn);
  if (!node) return;
  const focused = node.contains(document.activeElement) && document.activeElement.dataset.word;
  const current = chosen.turn === turn;
  node.classList.toggle("current", current);
  node.replaceChildren(el("h3", {}, el("span", { class: "hidden" }, "You asked: "), turn.question), ...answer(turn, current));
  if (focused) node.querySelector(`[data-word="${focused}"]`)?.focus();
}

function answer(turn, current) {
  if (turn.state === "waiting") return [progressRow(turn.progress ?? { stage: "question" })];
  if (turn.state === "failed") {
    const parts = turn.answer ? [el("p", { class: "answer" }, turn.answer)] : [];
    return [...parts, notice(turn.error, (again) => repeat(turn, again), turn.keep)];
  }
  if (turn.state === "streaming") return [el("p", { class: "answer streaming" }, turn.answer)];
  return [...text(turn, current), about(turn, current)];
}

/** The answer: one list of words, which is one tab stop, beside a copy that a screen reader reads as a sentence. */
function text(turn, current) {
  if (!turn.words?.length) return [el("p", { class: "answer" }, turn.answer || "(an empty answer)")];
  const thought = turn.words.findIndex(([word]) => word.includes("</think>")) + 1;
  const joined = (some) => some.map(([word]) => word).join("");
  const list = el("div", { class: "answer words", role: "listbox", "aria-label": "Words of the answer. Choose one to see what it looked at" });
  turn.words.forEach(([word, looked], place) => {
    if (place < thought) return;
    if (!word.trim()) { list.append(word); return; }
    const selected = current && chosen.word === place;
    const pick = () => say(choose(turn, selected ? null : place));
    list.append(el("span", {
      class: looked.length ? "word" : "word blank", role: "option", "aria-selected": String(selected), "data-word": String(place), tabIndex: -1,
      onclick: pick,
      onkeydown: (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(); }
        if (event.key === "Escape") say(choose(turn));
      },
    }, word));
  });
  roving(list, ".word");
  const parts = [el("p", { class: "hidden copy" }, joined(turn.words.slice(thought))), list];
  if (thought) parts.unshift(el("details", {}, el("summary", {}, "What the model thought first"), el("p", { class: "thought" }, joined(turn.words.slice(0, thought)))));
  return parts;
}

const quick = (seconds) => (seconds < 1 ? `${Math.round(1000 * seconds)}\u00a0ms` : seconds < 10 ? `${seconds.toFixed(1)}\u00a0s` : duration(seconds));

/** Below an answer: how it came about, and a way to its moments. */
function about(turn, current) {
  const facts = [];
  if (turn.state === "stopped") facts.push("Stopped.");
  if (turn.cut) facts.push("Cut at the longest length of an answer.");
  if (turn.first) facts.push(`First word after ${quick(turn.first)}${turn.reused ? "; the film was not read again." : ", reading the film included."}`);
  const row = el("div", { class: "row about" }, el("span", {}, facts.join(" ")));
  if (turn.moments && !current) row.append(el("button", { class: "quiet small", type: "button", onclick: () => say(choose(turn)) }, "Show where it looked"));
  else if (current && turn.words?.some(([, looked]) => looked.length)) row.append(el("span", {}, "Click a word to see what it looked at."));
  return row;
}

/** A bar with what is being done and how far it is. Reused by the film's own progress. */
export function progressRow(job, stop = null) {
  const [what, far] = progressText(job);
  const bar = el("progress", { "aria-label": what, max: job.total || 1 });
  if (job.total && job.stage !== "queued") bar.value = job.done;
  const row = el("div", { class: "row" }, el("span", {}, el("span", { class: "what" }, what), far ? el("span", { class: "soft" }, ` ${far}`) : null));
  if (stop) row.append(el("button", { class: "quiet small", type: "button", onclick: stop }, "Stop"));
  return el("div", { class: "progress" }, row, bar);
}

function repeat(turn, again) {
  const film = shown;
  if (film.asking) return;
  film.turns = film.turns.filter((one) => one !== turn);
  drawn.get(turn)?.remove();
  ask(film, turn.question, again);
}

/** Asks, with the whole conversation so far. `again`: keep trying while the server is busy. */
export async function ask(film, question, again = false) {
  const before = film.turns.filter((turn) => turn.answer && (turn.state === "done" || turn.state === "stopped"));
  const turn = { question, answer: "", words: null, moments: null, state: "waiting", progress: null, keep: again };
  film.turns.push(turn);
  film.asking = new AbortController();
  hooks.changed(film);
  if (shown === film) {
    choose(null);
    $("turns").append(article(turn));
    follow(turn, true);
  }
  try {
    await stream(film, turn, messages(film.id, before, question));
    turn.state = "done";
  } catch (error) {
    turn.state = stopped(error) ? "stopped" : "failed";
    turn.error = stopped(error) ? null : error;
    if (turn.state === "stopped" && !turn.answer) film.turns = film.turns.filter((one) => one !== turn);
    hooks.failed(error);
  }
  film.asking = null;
  keep(film);
  hooks.changed(film);
  finish(film, turn);
}

function finish(film, turn) {
  if (shown !== film) return;
  if (!film.turns.includes(turn)) { drawn.get(turn)?.remove(); say("Stopped."); return; }
  const wanted = atEnd(); // before the moments come
  if (turn.moments) choose(turn);
  else draw(turn);
  follow(turn, wanted);
  if (turn.state === "done") say(`Answer: ${turn.answer} ${turn.moments ? several(turn.moments.length, "moment") : ""}`);
}

/** OpenAI's messages: the film stands in the first, before its text. */
function messages(id, before, question) {
  const all = before.flatMap((turn) => [{ role: "user", content: turn.question }, { role: "assistant", content: turn.answer }]);
  all.push({ role: "user", content: question });
  all[0] = { role: "user", content: [{ type: "video_url", video_url: { url: id } }, { type: "text", text: all[0].content }] };
  return all;
}

async function stream(film, turn, conversation) {
  const started = performance.now();
  const body = { model: hooks.model(), messages: conversation, stream: true, tieredkv: { evidence: "tokens", progress: true } };
  for await (const chunk of events("v1/chat/completions", { body, signal: film.asking.signal })) {
    const ours = chunk.tieredkv ?? {};
    const [choice] = chunk.choices ?? [];
    if (ours.progress && turn.state === "waiting") {
      turn.progress = step(ours.progress);
      if (drawn.has(turn)) draw(turn);
    }
    if (choice?.delta?.content) add(turn, choice.delta.content, started);
    if (choice?.finish_reason === "length") turn.cut = true;
    if (ours.evidence) turn.moments = merged(ours.evidence).map(pack);
    if (ours.token_evidence) turn.words = words(ours.token_evidence).map(([word, looked]) => [word, looked.map(pack)]);
    if ("reused" in ours) turn.reused = ours.reused;
  }
}

function add(turn, piece, started) {
  const first = turn.state === "waiting";
  turn.answer += piece;
  if (first) {
    turn.first = (performance.now() - started) / 1000;
    turn.state = "streaming";
    draw(turn);
  } else drawn.get(turn)?.querySelector(".streaming")?.append(piece);
  follow(turn);
}

/** What scrolls: the conversation, or on a narrow page the whole page. */
const scroller = () => (log.scrollHeight > log.clientHeight + 1 ? log : document.documentElement);

/** Whether the reader has not scrolled away from the end. */
function atEnd() {
  const { scrollHeight, scrollTop, clientHeight } = scroller();
  return scrollHeight - scrollTop - clientHeight < 200;
}

/** Keeps the end in sight; on a narrow page also the question above it, if both fit between the film and the form. */
function follow(turn, wanted = atEnd()) {
  const node = drawn.get(turn);
  if (!wanted || !node?.isConnected) return;
  const place = scroller();
  const covered = place === log ? 0 : document.querySelector(".held").offsetHeight;
  const box = node.getBoundingClientRect();
  const fits = place !== log && box.height < place.clientHeight - covered - $("ask").offsetHeight - 40;
  place.scrollTop = Math.min(place.scrollHeight, fits ? place.scrollTop + box.top - covered - 16 : Infinity);
}
