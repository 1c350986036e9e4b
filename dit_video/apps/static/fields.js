// Fields of the form, made from the server's descriptions: texts, numbers, choices and flags.
import { make, makeButton, makeId } from "./dom.js";

/** A field with its label, help and error. A subclass makes the controls, and reads and sets the value. */
export class Field {
  constructor(description) {
    this.description = description;
    this.name = description.name;
    this.kind = description.kind;
    this.id = makeId(description.name);
    this.help = make("p", { class: "help", id: `${this.id}-help`, textContent: description.help, hidden: !description.help });
    this.error = make("p", { class: "error", id: `${this.id}-error`, hidden: true });
    this.listeners = [];
    this.element = null;
  }

  /** Put one control below a label. */
  layOut(control, ...more) {
    this.control = control;
    control.id = this.id;
    const label = make("label", { htmlFor: this.id, textContent: this.description.title });
    this.place("div", label, ...(more.length ? more : [control]), this.help, this.error);
    this.describe(control);
    control.addEventListener("input", () => this.change());
  }

  /** Put several controls below a legend. */
  layOutGroup(...controls) {
    this.legend = make("span", { class: "legend-text", id: `${this.id}-legend`, textContent: this.description.title });
    if (!this.description.required) this.legend.append(make("span", { class: "optional", textContent: " optional" }));
    this.place("div", this.legend, ...controls, this.help, this.error);
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-labelledby", this.legend.id);
    this.describe(this.element);
  }

  place(tag, ...children) {
    this.element = make(tag, { class: `field ${this.kind}-field` }, ...children);
    this.element.dataset.field = this.name;
  }

  describe(control) {
    const ids = [this.description.help && this.help.id, !this.error.hidden && this.error.id].filter(Boolean);
    ids.length ? control.setAttribute("aria-describedby", ids.join(" ")) : control.removeAttribute("aria-describedby");
  }

  onChange(listener) {
    this.listeners.push(listener);
  }

  change() {
    this.showError("");
    for (const listener of this.listeners) listener(this);
  }

  /** Show an error, or none for "". */
  showError(text) {
    this.error.textContent = text;
    this.error.hidden = !text;
    for (const control of this.controls) {
      text ? control.setAttribute("aria-invalid", "true") : control.removeAttribute("aria-invalid");
    }
    this.describe(this.control ?? this.element);
  }

  get controls() {
    return [this.control];
  }

  get isEmpty() {
    return this.value === null || this.value === "";
  }

  /** Return what is wrong with the value, or "". */
  check() {
    return this.description.required && this.isEmpty ? `${this.description.title} is needed.` : "";
  }

  focus() {
    this.control.focus();
  }

  reset() {
    return this.set(this.description.default);
  }
}

export class TextField extends Field {
  constructor(description) {
    super(description);
    const { lines = 1 } = description;
    const control = lines > 1 ? make("textarea", { rows: lines }) : make("input", { type: "text", autocomplete: "off" });
    control.required = description.required;
    this.layOut(control);
    this.reset();
  }

  get value() {
    return this.control.value;
  }

  set(value) {
    this.control.value = value ?? "";
  }
}

/** Return what is wrong with the text of a number, or "". */
function checkNumber(text, { title, min = null, above = null, max = null, is_whole: isWhole }) {
  const number = Number(text);
  if (text.trim() === "" || !Number.isFinite(number)) return `${title} must be a number.`;
  if (isWhole && !Number.isInteger(number)) return `${title} must be a whole number.`;
  if ((min !== null && number < min) || (max !== null && number > max)) {
    return `${title} must be ${max === null ? `at least ${min}` : min === null ? `at most ${max}` : `between ${min} and ${max}`}.`;
  }
  if (above !== null && number <= above) return `${title} must be above ${above}.`;
  return "";
}

class NumberField extends Field {
  constructor(description) {
    super(description);
    const { above = null, max, step, default: preset } = description;
    const min = description.min ?? (above === null ? null : above + step); // of arrows and the slider
    const limits = { min: min ?? "", max: max ?? "", step: step ?? (description.is_whole ? 1 : "any") };
    const control = make("input", { type: "number", inputMode: description.is_whole ? "numeric" : "decimal", ...limits });
    if (preset === null) control.placeholder = "automatic";
    else control.required = description.required;
    const hasSlider = min !== null && max !== null && preset !== null && !description.is_whole && (max - min) / step <= 200;
    if (hasSlider) {
      // For the pointer alone: keyboards and screen readers have the number.
      this.slider = make("input", { type: "range", ...limits, tabIndex: -1, "aria-hidden": "true" });
      this.slider.addEventListener("input", () => {
        control.value = this.slider.value;
        this.change();
      });
      control.addEventListener("input", () => (this.slider.value = control.value));
      this.layOut(control, make("div", { class: "with-slider" }, this.slider, control));
    } else if (this.name === "seed") {
      const draw = makeButton("Random", () => this.draw(), { "aria-label": "Random seed" });
      this.layOut(control, make("div", { class: "with-button" }, control, draw));
    } else {
      this.layOut(control);
    }
    this.reset();
  }

  get value() {
    return this.control.value.trim() === "" ? null : Number(this.control.value);
  }

  set(value) {
    this.control.value = value ?? "";
    if (this.slider) this.slider.value = this.control.value;
  }

  /** Set a random whole number. */
  draw() {
    const { min = 0, max = 2 ** 31 - 1 } = this.description;
    this.set(min + Math.floor(Math.random() * (max - min + 1)));
    this.change();
  }

  check() {
    // A browser gives "" for a text that is no number.
    if (this.control.validity.badInput) return `${this.description.title} must be a number.`;
    if (this.isEmpty) return this.description.default === null ? "" : super.check();
    return checkNumber(this.control.value, this.description);
  }
}

class ChoiceField extends Field {
  constructor(description) {
    super(description);
    // An option has a text alone for its value, the server's values may be numbers.
    const options = description.choices.map(({ title }, index) => make("option", { value: String(index), textContent: title }));
    this.layOut(make("select", {}, ...options));
    this.reset();
  }

  get value() {
    return this.description.choices[this.control.selectedIndex]?.value ?? null;
  }

  get isEmpty() {
    return this.value === null; // "" is a choice
  }

  set(value) {
    const index = this.description.choices.findIndex((choice) => String(choice.value) === String(value));
    this.control.selectedIndex = Math.max(index, 0);
  }
}

class FlagField extends Field {
  constructor(description) {
    super(description);
    this.control = make("input", { type: "checkbox", id: this.id });
    this.control.addEventListener("input", () => this.change());
    this.place("div", make("label", { class: "flag" }, this.control, description.title), this.help, this.error);
    this.describe(this.control);
    this.reset();
  }

  get value() {
    return this.control.checked;
  }

  get isEmpty() {
    return false;
  }

  set(value) {
    this.control.checked = Boolean(value);
  }
}

const AXES = { width: "Width", height: "Height", frames: "Frames" };

class SizeField extends Field {
  constructor(description) {
    super(description);
    const { axes, presets, steps, frames_offset: offset = 1 } = description;
    this.inputs = {};
    const parts = Object.keys(AXES).filter((axis) => axes.includes(axis)).map((axis) => {
      const first = axis === "frames" && offset ? offset : steps[axis];
      const input = make("input", { type: "number", id: `${this.id}-${axis}`, inputMode: "numeric", min: first, step: steps[axis], required: true });
      input.addEventListener("input", () => this.change());
      this.inputs[axis] = input;
      return make("div", { class: "axis" }, make("label", { htmlFor: input.id, textContent: AXES[axis] }), input);
    });
    this.presets = presets.map((preset) => ({ preset, button: makeButton(preset.title, () => this.choose(preset), { class: "chip" }) }));
    const chips = make("div", { class: "chips" }, ...this.presets.map(({ button }) => button));
    this.layOutGroup(presets.length ? chips : null, make("div", { class: "axes" }, ...parts));
    this.reset();
  }

  choose(preset) {
    this.set(preset);
    this.change();
  }

  get controls() {
    return Object.values(this.inputs);
  }

  get value() {
    return Object.fromEntries(Object.keys(AXES).map((axis) => [axis, axis in this.inputs ? Number(this.inputs[axis].value) : this.rest[axis]]));
  }

  set(value) {
    this.rest = { ...this.description.default, ...value };
    for (const [axis, input] of Object.entries(this.inputs)) input.value = this.rest[axis] ?? "";
    this.mark();
  }

  change() {
    super.change();
    this.mark();
  }

  /** Mark the preset that the size is. */
  mark() {
    const value = this.value;
    for (const { preset, button } of this.presets) {
      const isSame = Object.keys(this.inputs).every((axis) => preset[axis] === undefined || preset[axis] === value[axis]);
      button.setAttribute("aria-pressed", String(isSame));
    }
  }

  check() {
    const { steps, frames_offset: offset = 1 } = this.description;
    for (const [axis, input] of Object.entries(this.inputs)) {
      const number = Number(input.value), step = steps[axis];
      const rest = axis === "frames" ? offset : 0;
      if (!Number.isInteger(number) || number < 1 || (number - rest) % step) {
        const rule = rest ? `${rest} more than a multiple of ${step}, such as ${rest + 4 * step}` : `a multiple of ${step}, such as ${3 * step}`;
        this.wrong = input;
        return `${AXES[axis]} must be ${step === 1 ? "a whole number" : rule}.`;
      }
    }
    this.wrong = null;
    return "";
  }

  showError(text) {
    super.showError(text);
    for (const input of this.controls) {
      const isWrong = text && (!this.wrong || input === this.wrong);
      isWrong ? input.setAttribute("aria-invalid", "true") : input.removeAttribute("aria-invalid");
      text ? input.setAttribute("aria-describedby", this.error.id) : input.removeAttribute("aria-describedby");
    }
  }

  focus() {
    (this.wrong ?? this.controls[0]).focus();
  }
}

export const FIELDS = { text: TextField, number: NumberField, choice: ChoiceField, flag: FlagField, size: SizeField };
