// Fields of several images: of subjects, or of frames with their places in the clip.
import { announce, make, makeButton } from "./dom.js";
import { Field } from "./fields.js";
import { PictureField } from "./picture.js";

const MAX_ENTRIES = 8;

/** A field of images. Those of the kind `keyframes` have a frame, which the page counts from 1, and a strength. */
export class PicturesField extends Field {
  constructor(description, studio) {
    super(description);
    this.studio = studio;
    this.entries = [];
    this.list = make("div", { class: "entries" });
    this.addButton = makeButton("Add an image", () => this.add().picture.focus(), { "aria-label": `Add an image: ${description.title}` });
    this.layOutGroup(this.list, this.addButton);
    this.reset();
  }

  get hasPlaces() {
    return this.kind === "keyframes";
  }

  get controls() {
    return [this.addButton];
  }

  get filled() {
    return this.entries.filter(({ picture }) => !picture.isEmpty);
  }

  get value() {
    const values = this.filled.map(({ picture, at, strength }) => (this.hasPlaces ? { ...picture.value, at: Number(at.value) - 1, strength: Number(strength.value) } : picture.value));
    return values.length ? values : null;
  }

  async set(values) {
    for (const entry of [...this.entries]) this.drop(entry);
    const loading = (values ?? []).map((value) => this.add(value).picture.set(value));
    if (!this.entries.length && this.description.required) this.add();
    this.change();
    await Promise.all(loading);
  }

  reset() {
    return this.set(null);
  }

  /** Add an entry, and return it. */
  add({ at = 0, strength = 1 } = {}) {
    const number = (this.count = (this.count ?? 0) + 1); // of those before, too, so that no two have one name
    const picture = new PictureField({ name: `${this.name}-image`, kind: "image", title: `Image ${number}`, help: "", required: true }, this.studio);
    picture.remove = () => this.remove(entry);
    const entry = { picture, at: this.makeNumber({ value: at + 1, min: 1, step: 1 }), strength: this.makeNumber({ value: strength, min: 0.05, max: 1, step: 0.05 }) };
    const places = make(
      "div",
      { class: "places" },
      make("label", {}, "At frame", entry.at),
      make("label", {}, "Strength", entry.strength),
    );
    const discard = makeButton("Remove", () => this.remove(entry), { "aria-label": `Remove: Image ${number}` });
    picture.onChange(() => (discard.hidden = !picture.isEmpty)); // a picture has such a button of its own
    places.hidden = !this.hasPlaces;
    entry.element = make("div", { class: "entry" }, picture.element, places, discard);
    picture.onChange(() => this.change());
    this.entries.push(entry);
    this.list.append(entry.element);
    this.addButton.hidden = this.entries.length >= MAX_ENTRIES;
    return entry;
  }

  makeNumber(properties) {
    return make("input", { type: "number", ...properties, on: { input: () => this.change() } });
  }

  drop(entry) {
    entry.picture.stop();
    entry.element.remove();
    this.entries.splice(this.entries.indexOf(entry), 1);
    this.addButton.hidden = false;
  }

  remove(entry) {
    this.drop(entry);
    this.change();
    this.focus();
    announce("The image was removed");
  }

  /** Send a file that was pasted or dropped beside the fields. */
  send(file) {
    const free = this.entries.find(({ picture }) => picture.isEmpty && !picture.sending);
    if (!free && this.entries.length >= MAX_ENTRIES) return this.showError(`At most ${MAX_ENTRIES} images are used. Remove one first.`);
    (free ?? this.add()).picture.send(file);
  }

  check() {
    for (const { picture, at, strength } of this.entries) {
      if (picture.sending) return "A file is being sent. Wait for it, or stop it.";
      if (!this.hasPlaces || picture.isEmpty) continue;
      if (!(Number.isInteger(Number(at.value)) && Number(at.value) >= 1)) return "A frame is a whole number from 1.";
      if (!(Number(strength.value) > 0 && Number(strength.value) <= 1)) return "A strength is above 0 and at most 1.";
    }
    return super.check();
  }

  focus() {
    this.addButton.focus();
  }
}
