// The form: a tab for every task, and the sampling fields that all share.
import { announce, byId, make, makeButton } from "./dom.js";
import { FIELDS } from "./fields.js";
import { MaskField } from "./mask.js";
import { recall, remember } from "./memory.js";
import { PictureField } from "./picture.js";
import { PicturesField } from "./pictures.js";
import { PromptField } from "./prompt.js";
import { Tabs } from "./tabs.js";

const IN_VIEW = ["seed", "count"]; // sampling fields that are not in the part that opens
const CARRIED = ["text", "clip", "image"]; // kinds that go along to a tab with a field of the same name

export class Form {
  /** `submit` receives the job, and returns a promise. */
  constructor(model, studio, submit) {
    this.root = byId("form");
    this.studio = studio;
    this.submit = submit;
    this.model = model;
    this.storage = `studio:${model.title}`;
    this.stored = recall(this.storage);
    this.panels = new Map(model.tabs.map((tab) => [tab.name, this.makePanel(tab)]));
    this.tabs = new Tabs(byId("tabs"), model.tabs, (name) => this.select(name));
    this.sampling = this.makeFields(model.sampling);
    this.root.append(...[...this.panels.values()].map(({ element }) => element), ...this.makeSampling(), this.makeFoot());
    for (const field of this.sampling.values()) if (field.name in (this.stored.sampling ?? {})) field.set(this.stored.sampling[field.name]);
    this.root.addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    addEventListener("pagehide", () => this.store());
    addEventListener("hashchange", () => this.panels.has(location.hash.slice(1)) && this.select(location.hash.slice(1)));
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      this.start();
    });
    document.addEventListener("paste", (event) => this.take(event.clipboardData?.files[0], event));
    // A browser would leave the page for a file that is dropped beside a field.
    document.addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
    document.addEventListener("drop", (event) => {
      const [file] = event.dataTransfer.files;
      if (!file || event.defaultPrevented) return;
      event.preventDefault();
      this.take(file, event);
    });
    this.summarize();
    const start = [location.hash.slice(1), this.stored.tab].find((name) => this.panels.has(name));
    this.select(start ?? model.tabs[0].name);
  }

  makeFields(descriptions) {
    const fields = new Map();
    for (const description of descriptions) {
      const { name } = description;
      const field = this.makeField(description);
      fields.set(name, field);
      field.onChange(() => this.noteChange());
    }
    for (const field of fields.values()) if (field.kind === "mask") field.follow(fields.get(field.description.of));
    return fields;
  }

  makeField(description) {
    const { name, kind } = description;
    if (kind === "clip" || kind === "image") return new PictureField(description, this.studio);
    if (kind === "images" || kind === "keyframes") return new PicturesField(description, this.studio);
    if (kind === "mask") return new MaskField(description);
    if (name === "prompt") return new PromptField(description, this.model);
    return new (FIELDS[kind] ?? FIELDS.text)(description);
  }

  makePanel(tab) {
    const fields = this.makeFields(tab.fields);
    const element = make(
      "div",
      { class: "panel-fields", role: "tabpanel", id: `panel-${tab.name}`, "aria-labelledby": `tab-${tab.name}`, hidden: true },
      make("p", { class: "task-help", textContent: tab.help, hidden: !tab.help }),
      make("p", { class: "task-note", textContent: tab.note, hidden: !tab.note }),
      ...[...fields.values()].map((field) => field.element),
    );
    return { tab, fields, element, isRestored: false };
  }

  makeSampling() {
    const inView = [], hidden = [];
    for (const field of this.sampling.values()) (IN_VIEW.includes(field.name) ? inView : hidden).push(field.element);
    this.changed = make("span", { class: "muted" });
    const reset = makeButton("Reset to the model's own", () => this.resetSampling());
    this.details = make("details", { class: "sampling" }, make("summary", {}, "Sampling ", this.changed), make("div", { class: "sampling-fields" }, ...hidden), make("div", { class: "actions" }, reset));
    this.details.addEventListener("toggle", () => this.details.open && this.details.scrollIntoView({ block: "nearest" }));
    return [make("div", { class: "in-view" }, ...inView), ...(hidden.length ? [this.details] : [])];
  }

  makeFoot() {
    this.error = make("p", { class: "error", role: "alert", hidden: true });
    this.button = make("button", { type: "submit", class: "primary", "aria-keyshortcuts": "Control+Enter Meta+Enter" }, "Generate", make("kbd", { textContent: /Mac|iP/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵", "aria-hidden": "true" }));
    return make("div", { class: "foot" }, this.error, this.button);
  }

  get panel() {
    return this.panels.get(this.selected);
  }

  /** Show a tab. Texts, clips and images go along, if it has fields of the same names. */
  async select(name) {
    const previous = this.panel;
    this.selected = name;
    this.tabs.select(name);
    for (const [each, { element }] of this.panels) element.hidden = each !== name;
    this.showError("");
    if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
    const panel = this.panel;
    const carried = new Set();
    if (previous && previous !== panel) {
      for (const field of panel.fields.values()) {
        const other = previous.fields.get(field.name);
        if (other?.kind !== field.kind || !CARRIED.includes(field.kind) || other.isEmpty) continue;
        carried.add(field.name);
        if (field.kind === "text") field.set(other.value);
        else if (JSON.stringify(field.value) !== JSON.stringify(other.value)) field.choose(other.chosen);
      }
    }
    await (panel.restoring ??= this.restore(panel, carried));
    this.store();
  }

  /** Set the fields of a panel that is shown for the first time to what is stored, but for those that went along. */
  async restore(panel, carried) {
    const stored = Object.entries(this.stored.values?.[panel.tab.name] ?? {});
    await this.setAll(panel.fields, Object.fromEntries(stored.filter(([name]) => !carried.has(name))));
    panel.isRestored = true;
  }

  /** Set fields; masks last, as they lie over clips. */
  async setAll(fields, values) {
    const all = [...fields.values()].filter((field) => field.name in values);
    await Promise.all(all.filter((field) => field.kind !== "mask").map((field) => field.set(values[field.name])));
    await Promise.all(all.filter((field) => field.kind === "mask").map((field) => field.set(values[field.name])));
  }

  /** Fill the form as an item was made. */
  async fill({ tab, values, sampling, seed }) {
    if (!this.panels.has(tab)) return this.showError("This model has no tab of the task that made this clip.");
    await this.select(tab);
    await Promise.all([this.setAll(this.panel.fields, values), this.setAll(this.sampling, sampling)]);
    this.sampling.get("seed")?.set(seed);
    this.sampling.get("count")?.set(1); // an item is one video, with a seed of its own
    this.noteChange();
  }

  /** Use an item as the value of a field of a tab. */
  async useItem(tab, name, item) {
    await this.select(tab);
    const field = this.panel.fields.get(name);
    field.choose({ item });
    field.element.scrollIntoView({ block: "nearest" });
    field.focus();
  }

  drawSeed() {
    this.sampling.get("seed")?.draw();
  }

  focusButton() {
    this.button.scrollIntoView({ block: "nearest" });
    this.button.focus();
  }

  resetSampling() {
    for (const field of this.sampling.values()) {
      if (IN_VIEW.includes(field.name)) continue;
      field.reset();
      field.showError("");
    }
    this.noteChange();
    announce("Sampling is that of the model");
  }

  /** Select a checkpoint, if there is one of that name. */
  selectCheckpoint(value) {
    const field = this.sampling.get("checkpoint");
    if (!field?.description.choices?.some((choice) => String(choice.value) === value)) return this.showError(`There is no checkpoint ${value} to sample from.`);
    field.set(value);
    this.details.open = true;
    this.noteChange();
  }

  noteChange() {
    if (!this.button) return; // while the form is made
    this.showError("");
    this.summarize();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.store(), 300);
  }

  summarize() {
    const isChanged = (field) => String(field.value ?? "") !== String(field.description.default ?? "");
    const names = [...this.sampling.values()].filter((field) => !IN_VIEW.includes(field.name) && isChanged(field)).map((field) => field.description.title.toLowerCase());
    this.changed.textContent = names.length ? `changed: ${names.join(", ")}` : "";
  }

  store() {
    clearTimeout(this.timer);
    const values = { ...this.stored.values };
    for (const [name, panel] of this.panels) if (panel.isRestored) values[name] = this.read(panel.fields);
    this.stored = { tab: this.selected, values, sampling: this.read(this.sampling) };
    remember(this.storage, this.stored);
  }

  read(fields) {
    return Object.fromEntries([...fields].map(([name, field]) => [name, field.value]));
  }

  /** Put a pasted or dropped file into the field that has the focus, or the first one that is empty. */
  take(file, event) {
    if (!file || document.querySelector("dialog[open]")) return;
    const fields = [...this.panel.fields.values()].filter((field) => field.send && (field.kind === "clip" || file.type.startsWith("image/")));
    const field = fields.find((each) => each.element.contains(document.activeElement)) ?? fields.find((each) => each.isEmpty) ?? fields[0];
    if (!field) return;
    event.preventDefault();
    field.send(file);
  }

  showError(text) {
    if (!this.error) return;
    this.error.textContent = text;
    this.error.hidden = !text;
  }

  /** Show what is wrong with fields, and move the focus to the first; return whether all are right. */
  check() {
    const fields = [...this.panel.fields.values(), ...this.sampling.values()];
    const wrong = fields.filter((field) => {
      const text = field.check();
      field.showError(text);
      return text;
    });
    if (!wrong.length) return true;
    this.reveal(wrong[0]);
    announce(wrong.map((field) => field.error.textContent).join(" "));
    return false;
  }

  reveal(field) {
    if (this.details.contains(field.element)) this.details.open = true;
    field.element.scrollIntoView({ block: "nearest" });
    field.focus();
  }

  /** Start a job with what the form says. */
  async start() {
    if (this.isStarting || !this.check()) return;
    this.isStarting = true;
    this.button.setAttribute("aria-disabled", "true");
    this.showError("");
    this.store();
    try {
      await this.submit({ tab: this.selected, values: this.read(this.panel.fields), sampling: this.read(this.sampling) });
    } catch (error) {
      this.refuse(error);
    } finally {
      this.isStarting = false;
      this.button.removeAttribute("aria-disabled");
    }
  }

  refuse(error) {
    const field = error.field && (this.panel.fields.get(error.field) ?? this.sampling.get(error.field));
    if (!field) return this.showError(error.message);
    field.showError(error.message);
    this.reveal(field);
    announce(error.message);
  }
}
