// Files dropped anywhere on the page.

import { $ } from "./dom.js";

const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");

/** Calls `take(files)` for what is dropped. */
export function onDrop(take) {
  window.addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    $("curtain").hidden = false;
  });
  window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("curtain").hidden = true; });
  window.addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    $("curtain").hidden = true;
    take([...event.dataTransfer.files]);
  });
}
