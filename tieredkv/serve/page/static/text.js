// Pure functions: times, sizes and shares as text, words of an answer, positions of labels.

export function timecode(seconds, hours = seconds >= 3600) {
  const whole = Math.max(0, Math.floor(seconds + 1e-6));
  const two = (n) => String(n).padStart(2, "0");
  const minutes = Math.floor(whole / 60) % 60;
  return hours ? `${Math.floor(whole / 3600)}:${two(minutes)}:${two(whole % 60)}` : `${Math.floor(whole / 60)}:${two(whole % 60)}`;
}

/** Start and end of a moment, rounded outwards to whole seconds. */
export function span(moment, between = "\u2009\u2013\u2009") {
  const last = Math.ceil(moment.end - 1e-6);
  return timecode(moment.start, last >= 3600) + between + timecode(last, last >= 3600);
}

export function share(weight) {
  return weight >= 0.0995 ? `${Math.round(100 * weight)}\u00a0%` : `${(100 * weight).toFixed(1)}\u00a0%`;
}

export function bytes(count) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (count >= 999.5 && place < units.length - 1) { count /= 1000; place += 1; }
  return `${place === 0 || count >= 99.5 ? Math.round(count) : count.toFixed(1)}\u00a0${units[place]}`;
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))}\u00a0s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)}\u00a0min`;
  return `${(seconds / 3600).toFixed(1)}\u00a0h`;
}

export const count = (number) => Math.round(number).toLocaleString("en");
export const several = (number, one) => `${count(number)} ${one}${number === 1 ? "" : "s"}`;

/** A server's sentence as the first of a paragraph. A name or an option keeps its spelling. */
export const sentence = (text) => (/^[a-z]+ /.test(text) ? text[0].toUpperCase() + text.slice(1) : text);

/** A moment in four numbers, as it is kept. */
export const pack = (m) => [m.start, m.end, m.weight, m.peak].map((n) => Math.round(n * 1000) / 1000);
export const unpack = ([start, end, weight, peak]) => ({ start, end, weight, peak });

/** Words of an answer, each with what all tokens in it looked at, best first: [[text, moments], ...]. */
export function words(tokens) {
  const owner = [];
  tokens.forEach((token, place) => { for (let i = 0; i < token.text.length; i += 1) owner.push(place); });
  const text = tokens.map((token) => token.text).join("");
  return [...text.matchAll(/\s+|\S+/gu)].map(([piece], place, all) => {
    const from = all[place].index;
    const parts = new Set(owner.slice(from, from + piece.length));
    return [piece, piece.trim() ? merged([...parts].flatMap((part) => tokens[part].moments ?? [])) : []];
  });
}

/** Of moments that overlap, the strongest. */
export function merged(moments) {
  const kept = [];
  for (const one of [...moments].sort((a, b) => b.weight - a.weight)) {
    if (!kept.some((other) => one.start < other.end && other.start < one.end)) kept.push(one);
  }
  return kept;
}

/** Centres of labels `width` wide, each near its place, without overlaps. The mean of pushing right and pushing left. */
export function spread(places, width, low, high) {
  const n = places.length;
  width = Math.min(width, (high - low) / Math.max(1, n));
  const order = places.map((_, i) => i).sort((a, b) => places[a] - places[b]);
  const right = [];
  const left = [];
  order.forEach((i, rank) => {
    const edge = rank ? right[order[rank - 1]] + width : low + width / 2;
    right[i] = Math.min(Math.max(places[i], edge), high - width / 2 - (n - 1 - rank) * width);
  });
  for (let rank = n - 1; rank >= 0; rank -= 1) {
    const i = order[rank];
    const edge = rank + 1 < n ? left[order[rank + 1]] - width : high - width / 2;
    left[i] = Math.max(Math.min(places[i], edge), low + width / 2 + rank * width);
  }
  return places.map((_, i) => (right[i] + left[i]) / 2);
}

const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400];

/** Times of the axis, `most` at most. */
export function ticks(length, most) {
  const step = STEPS.find((one) => length / one < most) ?? 14400 * Math.ceil(length / 14400 / most);
  return Array.from({ length: Math.floor(length / step + 1e-9) + 1 }, (_, i) => i * step);
}
