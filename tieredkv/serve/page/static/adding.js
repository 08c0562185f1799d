// A new film on its way: upload, then ingest.

import { events, stopped, upload } from "./api.js";
import { bytes, count, duration, several } from "./text.js";

let line = Promise.resolve();

/** Uploads a film after those before it, and has it read. `changed(film)` is called at every step. */
export function add(film, file, changed) {
  film.job = { stage: "waiting", stop: new AbortController() };
  line = line.then(() => bring(film, file, changed));
  return line;
}

async function bring(film, file, changed) {
  const { signal } = film.job.stop;
  const started = performance.now();
  const step = (fields) => { film.job = { ...film.job, ...fields, failed: null }; changed(film); };
  try {
    if (signal.aborted) throw new DOMException("stopped", "AbortError");
    step({ stage: "upload", done: 0, total: file.size });
    const made = await upload(file, (done, total) => {
      const left = ((performance.now() - started) / 1000 / Math.max(1, done)) * (total - done);
      step({ stage: done < total ? "upload" : "check", done, total, left });
    }, signal);
    film.id = made.id;
    film.name = made.filename ?? film.name;
    changed(film);
    await ingest(film, changed);
  } catch (error) {
    fail(film, error, changed, (keep) => {
      film.job = { stage: "waiting", stop: new AbortController(), keep };
      return bring(film, file, changed);
    });
  }
}

/** Has the server read a film that is there. */
export async function ingest(film, changed) {
  film.job ??= { stop: new AbortController() };
  const again = (keep) => {
    film.job = { stop: new AbortController(), keep };
    return ingest(film, changed);
  };
  try {
    film.job = { ...film.job, stage: "queued", done: 0, total: null, left: null, failed: null };
    changed(film);
    const path = `v1/files/${encodeURIComponent(film.id)}/ingest`;
    for await (const event of events(path, { body: {}, signal: film.job.stop.signal }, (one) => isReady(one))) {
      if (isReady(event)) {
        film.seconds ??= event.seconds;
        film.job = null;
      } else film.job = { ...film.job, ...step(event) };
      changed(film);
    }
  } catch (error) {
    fail(film, error, changed, again);
  }
}

const isReady = (event) => "reused" in event;

function fail(film, error, changed, again) {
  if (stopped(error)) film.job = film.id ? null : { stage: "stopped", again };
  else film.job = { stage: "failed", failed: error, again, keep: film.job?.keep };
  changed(film, error);
}

/** A Progress of the server with the time that is left. */
export function step({ stage, done, total, seconds }) {
  const left = total && done > 0 && seconds > 0.5 ? (seconds / done) * (total - done) : null;
  return { stage, done, total, left };
}

/** What is being done, how far it is, and how long it will take: [what, how far]. */
export function progressText(job) {
  const left = job.left === null || job.left === undefined ? "" : `, about ${duration(job.left)} left`;
  switch (job.stage) {
    case "waiting": return ["Waiting for the film before it", ""];
    case "upload": return ["Uploading", `${bytes(job.done)} of ${bytes(job.total)}${job.done ? left : ""}`];
    case "check": return ["Uploaded. The server looks at it", ""];
    case "queued": return ["Waiting for the model", job.done ? `${several(job.done, "request")} before this one` : ""];
    case "ingest": return ["Reading the film", job.total ? `${count(job.done)} of ${several(job.total, "token")}${left}` : job.done ? several(job.done, "token") : ""];
    case "load": return ["Loading what was read of the film before", ""];
    case "question": return ["Reading the question", ""];
    case "stopped": return ["Stopped", ""];
    default: return [job.stage, ""];
  }
}

/** A sentence that says what is wrong with a file before it is sent, or null. */
export function unfit(file, limits) {
  if (file.size === 0) return `${file.name} is empty: choose another file.`;
  const most = limits?.upload_bytes;
  if (most && file.size > most) {
    return `${file.name} has ${bytes(file.size)}; this server takes films of ${bytes(most)} at most. Cut it or encode it smaller.`;
  }
  return null;
}

