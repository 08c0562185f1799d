// The film itself: the browser's player, or single frames where the browser cannot play the codec.

import { contentUrl, frameUrl, json } from "./api.js";
import { $ } from "./dom.js";
import { timecode } from "./text.js";

const video = $("video");
const frame = $("frame");
const note = $("codec");
const nothing = $("no-picture");
const play = $("play");

let film = null;
let frames = false;
let now = 0;
let changed = () => {};
let drawing = 0;

/** `listener` is called whenever the time or the length of the shown film changes. */
export function onTime(listener) { changed = listener; }

export const time = () => (frames ? now : video.currentTime);

/** Seconds; 0 if not known yet. */
export function length() {
  if (!frames && Number.isFinite(video.duration) && video.duration > 0) return video.duration;
  return film?.seconds ?? 0;
}

export const playing = () => !frames && !video.paused && !video.ended;

export function show(next) {
  film = next;
  frames = false;
  now = 0;
  frame.hidden = nothing.hidden = note.hidden = true;
  frame.removeAttribute("src");
  video.hidden = false;
  video.setAttribute("aria-label", `Film: ${film.name}`);
  video.src = film.blob ?? contentUrl(film.id);
  for (const button of [play, $("mute"), $("large")]) button.hidden = false;
  changed();
}

/** The film is on the server now, or its length is known: frames can be shown. */
export function refresh() {
  if (frames) drawFrame();
  changed();
}

export function seek(seconds) {
  const end = length();
  const to = Math.max(0, end ? Math.min(seconds, end - 0.01) : seconds);
  if (!frames) { video.currentTime = to; return; }
  now = to;
  clearTimeout(drawing);
  drawing = setTimeout(drawFrame, 80); // a dragged slider asks for the place where it stays
  changed();
}

function drawFrame() {
  if (!film.id) {
    nothing.textContent = "Frames are shown as soon as the film is uploaded.";
    nothing.hidden = false;
    return;
  }
  nothing.hidden = true;
  frame.hidden = note.hidden = false;
  frame.alt = `Frame at ${timecode(now)}`;
  frame.src = frameUrl(film.id, now, 960);
}

function useFrames() {
  if (frames) return;
  frames = true;
  video.pause();
  video.hidden = true;
  for (const button of [play, $("mute"), $("large")]) button.hidden = true;
  note.textContent = "This browser cannot play the film’s codec, so single frames are shown. The slider moves through them.";
  note.hidden = false;
  drawFrame();
  changed();
}

video.addEventListener("error", async () => {
  const failed = film;
  if (!video.getAttribute("src") || !failed) return;
  if (!failed.blob) {
    try { await json(`v1/files/${encodeURIComponent(failed.id)}`); } catch (error) {
      if (failed !== film) return;
      video.hidden = true;
      nothing.textContent = error.status === 404 ? "This film is no longer on the server. Add it again." : "The film cannot be loaded.";
      nothing.hidden = false;
      return;
    }
  }
  if (failed === film) useFrames();
});
video.addEventListener("loadedmetadata", () => {
  if (video.videoWidth === 0) { useFrames(); return; } // it plays the sound alone
  if (film && Number.isFinite(video.duration)) film.seconds = video.duration;
  changed();
});
frame.addEventListener("error", () => {
  frame.hidden = true;
  note.hidden = !film.seconds; // of unknown length: the server cannot read it either
  nothing.textContent = film.seconds ? `There is no frame at ${timecode(now)}.` : "Neither this browser nor the server can show this film.";
  nothing.hidden = false;
});
const toggle = () => {
  if (playing()) video.pause();
  else video.play().catch(() => {}); // a film that cannot be played reports an error of its own
};
play.onclick = toggle;
video.onclick = () => { if (!document.fullscreenElement) toggle(); };
for (const name of ["play", "pause", "ended"]) {
  video.addEventListener(name, () => {
    play.setAttribute("aria-label", playing() ? "Pause" : "Play");
    play.classList.toggle("is-on", playing());
  });
}
$("mute").onclick = () => {
  video.muted = !video.muted;
  $("mute").setAttribute("aria-pressed", String(video.muted));
};
$("large").onclick = () => video.requestFullscreen?.().catch(() => {}); // refused: the film stays as it is
document.addEventListener("fullscreenchange", () => { video.controls = document.fullscreenElement === video; });
for (const name of ["timeupdate", "seeked", "durationchange"]) video.addEventListener(name, () => changed());
