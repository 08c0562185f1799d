// Under the film: a rail to move along, and where an answer or a word looked, as numbered marks and thumbnails.

import { frameUrl } from "./api.js";
import { $, el, roving } from "./dom.js";
import * as player from "./player.js";
import { share, span, spread, ticks, timecode } from "./text.js";

const MARK = 26; // pixels; large enough for a finger, and twelve fit a phone
const position = $("position");

const AT_ONCE = 2; // frames; a browser opens six connections to a server, and a question must find one free

let moments = [];
let film = null;
let laidOut = "";

/** Shows moments, best first, or none; `title` says whose they are. */
export function show(next, found, title) {
  film = next;
  moments = found;
  laidOut = "";
  $("looked").textContent = title;
  $("found").hidden = title === "";
  $("meaning").hidden = found.length === 0;
  for (const picture of $("moments").querySelectorAll("img")) if (!picture.complete) picture.removeAttribute("src");
  $("moments").replaceChildren(...found.map(thumbnail));
  loadFrames();
  $("marks").replaceChildren(...found.map(mark));
  $("bands").replaceChildren(...found.map(() => el("div", { class: "band" })));
  roving($("marks"), "button");
  update();
}

const named = (moment, place) => `moment ${place + 1}, ${span(moment, " to ")}`;

function mark(moment, place) {
  return el("button", { type: "button", "aria-label": named(moment, place), onclick: () => go(moment) }, String(place + 1));
}

function thumbnail(moment, place) {
  const picture = el("img", { alt: "", decoding: "async" });
  const button = el("button", { type: "button", "aria-label": `${named(moment, place)}, ${share(moment.weight)} of the attention`, onclick: () => go(moment) },
    picture, el("b", {}, String(place + 1)), el("i", {}, share(moment.weight)), el("span", { class: "span" }, span(moment)));
  return el("li", {}, button);
}

/** Loads the thumbnails, the best first. Ends when others are shown. */
function loadFrames() {
  const pictures = [...$("moments").querySelectorAll("img")];
  const { id } = film ?? {};
  let next = 0;
  const load = () => {
    const place = next;
    const picture = pictures[place];
    if (!picture?.isConnected) return;
    next += 1;
    picture.onload = load;
    picture.onerror = () => {
      load();
      picture.replaceWith(el("span", { class: "none" }, "no frame"));
    };
    picture.src = frameUrl(id, moments[place].peak, 320);
  };
  for (let i = 0; i < AT_ONCE; i += 1) load();
}

/** A film that plays goes on from the moment's start; one that stands shows its clearest frame. */
function go(moment) {
  player.seek(player.playing() ? moment.start : moment.peak);
}

function update() {
  const length = player.length() || Math.max(0, ...moments.map((moment) => moment.end));
  const now = player.time();
  position.disabled = length === 0;
  position.max = String(length || 1);
  if (document.activeElement !== position || Math.abs(Number(position.value) - now) > 1) position.value = String(now);
  $("clock").textContent = length ? `${timecode(now, length >= 3600)} / ${timecode(length)}` : "";
  position.setAttribute("aria-valuetext", `${timecode(now)} of ${timecode(length)}`);
  const inside = moments.map((moment) => now >= moment.start - 0.05 && now < moment.end);
  for (const list of [$("marks").children, $("moments").querySelectorAll("button")]) {
    [...list].forEach((button, place) => button.setAttribute("aria-current", String(inside[place] ?? false)));
  }
  layOut(length);
}

function layOut(length) {
  const width = $("rail").clientWidth;
  const state = `${width} ${length}`;
  if (state === laidOut || width === 0) return;
  laidOut = state;
  if (length === 0) { $("ticks").replaceChildren(); return; }
  const x = (seconds) => (width * seconds) / length;
  const strongest = Math.max(...moments.map((moment) => moment.weight), 1e-9);
  [...$("bands").children].forEach((band, place) => {
    const { start, end, weight } = moments[place];
    const wide = Math.max(3, x(end - start));
    band.style.left = `${Math.min(width - wide, Math.max(0, x((start + end) / 2) - wide / 2))}px`;
    band.style.width = `${wide}px`;
    band.style.opacity = String(0.25 + 0.75 * (weight / strongest));
  });
  const peaks = moments.map((moment) => x((moment.start + moment.end) / 2));
  const centres = spread(peaks, MARK, 0, width);
  [...$("marks").querySelectorAll("button")].forEach((button, place) => { button.style.left = `${centres[place]}px`; });
  leads(peaks, centres, width);
  const axis = ticks(length, Math.max(2, Math.floor(width / 70)));
  $("ticks").replaceChildren(...axis.map((seconds) => {
    const label = el("span", { class: x(seconds) < 16 ? "first" : x(seconds) > width - 18 ? "last" : "" }, timecode(seconds, length >= 3600));
    label.style.left = `${x(seconds)}px`;
    return label;
  }));
}

/** Lines from the marks down to their places. */
function leads(peaks, centres, width) {
  const made = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  $("marks").querySelector("svg")?.remove();
  const svg = made("svg", { viewBox: `0 0 ${width} 10`, "aria-hidden": "true" });
  svg.append(...peaks.map((peak, i) => made("path", { d: `M${centres[i]} 0V3L${peak} 10` })));
  if (moments.length) $("marks").append(svg);
}

position.addEventListener("input", () => player.seek(Number(position.value)));
position.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  player.seek(player.time() + step);
});
player.onTime(update);
new ResizeObserver(update).observe($("rail"));
