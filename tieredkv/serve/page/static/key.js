// The dialog that asks for a key.

import { $ } from "./dom.js";

/** Resolves to a key. `again`: the one before was wrong. */
export function askForKey(again) {
  const dialog = $("key");
  if (again) $("key-why").textContent = "That key was not accepted. Try another.";
  $("key-text").value = "";
  dialog.showModal();
  dialog.onclose = () => dialog.showModal(); // without a key there is nothing to show
  return new Promise((resolve) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      dialog.onclose = null;
      dialog.close();
      resolve($("key-text").value.trim());
    };
  });
}
