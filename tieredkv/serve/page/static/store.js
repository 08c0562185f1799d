// Conversations kept in this browser: the latest ones, within a bound.

const HELD = "tieredkv.conversations";
const FILMS = 20;
const TURNS = 50;
const CHARACTERS = 2_000_000; // browsers give a site about 5 MB

function read() {
  try {
    const kept = JSON.parse(localStorage.getItem(HELD) ?? "{}");
    return kept && typeof kept.films === "object" && kept.films ? kept : { films: {}, last: null };
  } catch {
    return { films: {}, last: null }; // unreadable, or storage is switched off
  }
}

function write(kept) {
  const oldest = () => Object.keys(kept.films).sort((a, b) => kept.films[a].used - kept.films[b].used);
  while (Object.keys(kept.films).length > FILMS) delete kept.films[oldest()[0]];
  for (;;) {
    const text = JSON.stringify(kept);
    const ids = oldest();
    try {
      if (text.length <= CHARACTERS || ids.length === 0) { localStorage.setItem(HELD, text); return; }
    } catch {
      if (ids.length === 0) return; // storage is full of others' or switched off: this visit only
    }
    const film = kept.films[ids[0]];
    if (ids.length > 1) delete kept.films[ids[0]];
    else if (film.turns.length > 1) film.turns.shift();
    else kept.films = {};
  }
}

/** The demo film is the same film in every server, whatever its id. */
export const nameOf = (film) => (film.demo ? "demo" : film.id);

/** Keeps a film's finished turns. */
export function keep(film) {
  if (!film.id) return;
  const kept = read();
  const turns = film.turns.filter((turn) => turn.state === "done" || turn.state === "stopped").slice(-TURNS);
  const fields = ({ question, answer, words, moments, state, cut, reused, first }) => ({ question, answer, words, moments, state, cut, reused, first });
  kept.films[nameOf(film)] = { used: Date.now(), seconds: film.seconds ?? null, turns: turns.map(fields) };
  write(kept);
}

/** What is kept of a film. */
export function recall(film) {
  const { seconds = null, turns = [] } = read().films[nameOf(film)] ?? {};
  return { seconds, turns };
}

export function drop(film) {
  const kept = read();
  delete kept.films[nameOf(film)];
  write(kept);
}

export function dropAll() { write({ films: {}, last: read().last }); }
export const lastFilm = () => read().last ?? null;
export function setLast(film) { write({ ...read(), last: nameOf(film) }); }
