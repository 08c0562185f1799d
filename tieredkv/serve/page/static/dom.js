// Elements. Text that comes from elsewhere is always set as text, never parsed.

export const $ = (id) => document.getElementById(id);

/** An element with properties, attributes (names with a dash, and role) and event handlers (`onclick`). */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "role" || name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

let cleared = 0;

/** Tells a screen reader. */
export function say(text) {
  const place = $("say");
  place.textContent = "";
  clearTimeout(cleared);
  // An empty region that is filled later is read even if the text is the same as before.
  cleared = setTimeout(() => { place.textContent = text; }, 50);
}

/** One tab stop for all `items` of a container; arrow keys, Home and End move between them. */
export function roving(container, selector) {
  const items = () => [...container.querySelectorAll(selector)];
  const settle = (active) => items().forEach((item) => { item.tabIndex = item === active ? 0 : -1; });
  settle(items().find((item) => item.getAttribute("aria-selected") === "true") ?? items()[0]);
  if (container.dataset.roving) return;
  container.dataset.roving = "yes";
  container.addEventListener("focusin", (event) => {
    const item = event.target.closest(selector);
    if (item) settle(item);
  });
  container.addEventListener("keydown", (event) => {
    const all = items();
    const at = all.indexOf(event.target.closest(selector));
    if (at < 0) return;
    const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (next === undefined || !all[next]) return;
    event.preventDefault();
    all[next].focus();
  });
}

/** Asks before something is lost; resolves to true or false. */
export function sure(title, text, yes) {
  const dialog = $("sure");
  $("sure-title").textContent = title;
  $("sure-text").textContent = text;
  $("sure-yes").textContent = yes;
  return new Promise((resolve) => {
    const end = (answer) => () => { resolve(answer); dialog.close(); };
    $("sure-yes").onclick = end(true);
    $("sure-no").onclick = end(false);
    dialog.onclose = () => resolve(false);
    dialog.showModal();
  });
}
