// Elements of the page. Text reaches it as text nodes alone.

/** Return a new element. Names of properties that it lacks are set as attributes; `on` holds listeners. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Return a button with a visible text. */
export const makeButton = (text, click, properties = {}) =>
  make("button", { type: "button", textContent: text, on: { click }, ...properties });

export const byId = (id) => document.getElementById(id);

let ids = 0;
/** Return an id that no other element has. */
export const makeId = (name) => `${name}-${++ids}`;

export const prefersStillness = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Let a screen reader say a text when it has finished what it says. */
export function announce(text) {
  // Everything outside of an open dialog is inert, live regions too.
  const host = [...document.querySelectorAll("dialog[open]")].at(-1) ?? document.body;
  let region = host.querySelector(":scope > .live");
  if (!region) {
    region = make("div", { class: "live unseen", role: "status" });
    host.append(region);
  }
  region.textContent = "";
  setTimeout(() => {
    region.textContent = text;
  }, 50);
}

/** Open a modal dialog with a heading, which is removed when it is closed. */
export function openDialog(title, properties, ...children) {
  const heading = make("h2", { id: makeId("dialog"), textContent: title });
  const close = makeButton("Close", () => dialog.close(), { class: "close" });
  const dialog = make("dialog", { "aria-labelledby": heading.id, ...properties });
  dialog.append(make("div", { class: "dialog-head" }, heading, close), ...children);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Ask before something is lost; resolve to whether it was confirmed. */
export function confirmInDialog(question, text, action) {
  return new Promise((resolve) => {
    let isConfirmed = false;
    const confirm = makeButton(
      action,
      () => {
        isConfirmed = true;
        dialog.close();
      },
      { class: "danger" },
    );
    const keep = makeButton("Keep", () => dialog.close(), { autofocus: true });
    const dialog = openDialog(question, { class: "small-dialog" }, make("p", { textContent: text }), make("div", { class: "actions" }, confirm, keep));
    dialog.addEventListener("close", () => resolve(isConfirmed));
  });
}

/** Copy a text, and say so in the button that was pressed. */
export async function copyText(text, button) {
  const isCopied = await writeClipboard(text, button);
  const label = button.dataset.label ?? button.textContent;
  button.dataset.label = label;
  button.textContent = isCopied ? "Copied" : "Not copied: select the text";
  announce(button.textContent);
  setTimeout(() => {
    button.textContent = label;
  }, 1800);
}

async function writeClipboard(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages of plain http have no clipboard, nor do browsers that refuse it: a selected text can be copied.
    const area = make("textarea", { class: "unseen", readOnly: true, value: text, tabIndex: -1, "aria-hidden": "true" });
    area.style.whiteSpace = "pre"; // else the indentation is lost
    button.parentElement.append(area); // inside of a dialog, which alone can hold the focus
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    button.focus();
    return isCopied;
  }
}

export const formatBytes = (bytes) =>
  bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;

export const formatSeconds = (seconds) =>
  seconds < 90 ? `${Math.max(1, Math.round(seconds))} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;

export const formatSize = ({ frames, height, width }) =>
  frames === 1 ? `${width}×${height}` : `${width}×${height}, ${frames} frames`;

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
