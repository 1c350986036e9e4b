// The field of a prompt: prompts to begin with while it is empty, and expansion by a language model.
import { postExpansion } from "./api.js";
import { announce, make, makeButton } from "./dom.js";
import { TextField } from "./fields.js";

const MAX_LINES = 8;
const LETTERS_PER_LINE = 60;

export class PromptField extends TextField {
  /** `examples` are prompts of the model; `expands` is whether the server expands prompts. */
  constructor(description, { examples, expands }) {
    super(description);
    const chips = examples.map((text) => makeButton(text, () => this.replace(text), { class: "chip" }));
    this.examples = make("div", { class: "chips examples", role: "group", "aria-label": "Prompts to begin with" }, ...chips);
    this.expandButton = makeButton("Expand", () => this.expand(), { title: "Let a language model add what is seen" });
    this.undoButton = makeButton("Undo", () => this.replace(this.original), { hidden: true });
    this.tools = make("div", { class: "actions prompt-tools" }, this.expandButton, this.undoButton);
    this.tools.hidden = !expands;
    this.help.before(this.examples, this.tools);
    this.onChange(() => this.update());
    this.update();
  }

  set(value) {
    super.set(value);
    if (this.tools) this.update();
  }

  update() {
    this.examples.hidden = !this.isEmpty || !this.examples.children.length;
    this.expandButton.disabled = this.isEmpty || this.isExpanding;
    this.undoButton.hidden = this.value !== this.expanded;
    const { lines = 1 } = this.description;
    this.control.rows = Math.max(lines, Math.min(MAX_LINES, Math.ceil(this.value.length / LETTERS_PER_LINE)));
  }

  replace(text) {
    this.set(text);
    this.change();
    this.focus();
  }

  async expand() {
    const original = this.value;
    this.isExpanding = true;
    this.expandButton.textContent = "Expanding …";
    this.update();
    try {
      const text = await postExpansion(original);
      if (this.value === original) {
        [this.original, this.expanded] = [original, text];
        this.replace(text);
        announce("The prompt was expanded");
      }
    } catch (error) {
      this.showError(error.message);
    } finally {
      this.isExpanding = false;
      this.expandButton.textContent = "Expand";
      this.update();
    }
  }
}
